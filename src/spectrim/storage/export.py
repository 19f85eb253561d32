"""A compressed folder for tools that do not know spectrim."""

from __future__ import annotations

from pathlib import Path

from spectrim.errors import InputError
from spectrim.storage.compressed_tensors import export_compressed_tensors
from spectrim.storage.dense import export_dense
from spectrim.storage.gguf_file import export_gguf
from spectrim.storage.onnx_graph import export_onnx

EXPORTS = {
    "dense": export_dense,
    "compressed-tensors": export_compressed_tensors,
    "gguf": export_gguf,
    "onnx": export_onnx,
}
"""What a folder can be written as."""


def export_folder(
    folder: str | Path, output: str | Path, *, to: str = "dense", overwrite: bool = False
) -> Path:
    """Write a compressed folder as dense weights, or in a format that inference engines read.

    Args:
        folder: a result of spectrim.
        output: a new or empty folder, or any model folder with `overwrite`.
        to: a key of `EXPORTS`.
        overwrite: replace the model folder that is there.

    Raises:
        InputError: an unknown format, or a target that it cannot hold.
        ArtifactError, OutputError: see the exports.
    """
    if to not in EXPORTS:
        raise InputError(f"unknown format {to!r}; a result can become {', '.join(EXPORTS)}")
    return EXPORTS[to](folder, output, overwrite=overwrite)
