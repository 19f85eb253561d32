"""Safetensors headers without the tensors: names, dtypes, shapes, and whether the file is whole.

A safetensors file is eight bytes of little-endian header length, a JSON header, and the data.
Every number in it is checked against the size of the file before it is believed. No torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

from spectrim.errors import ArtifactError

HEADER_LIMIT = 100_000_000
"""The largest header that the format allows, in bytes."""

MAX_AXES = 16
LONGEST_NAME = 1000
MOST_TENSORS = 1_000_000

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file.

    Attributes:
        name: its key.
        dtype: the format's own name, e.g. `BF16`.
        shape: its axes.
        begin: first byte, counted from the end of the header.
        end: one past its last byte.
        file: name of the file it lies in.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    file: str

    @property
    def bytes(self) -> int:
        """Bytes of data on disk."""
        return self.end - self.begin


def read_header(path: str | Path) -> dict[str, TensorEntry]:
    """Read and verify the header of one file; tensors come in the order of their data.

    Raises:
        ArtifactError: the file is missing, truncated or damaged; names the file and, where one
            is to blame, the tensor.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(HEADER_LIMIT, size - 8):
                raise ArtifactError(
                    f"{path} is damaged or truncated: its header claims {length} bytes, "
                    f"the file has {size}"
                )
            raw = file.read(length)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    entries = sorted(_entries(raw, path), key=lambda entry: (entry.begin, entry.end))
    _check_extents(entries, size - 8 - length, path)
    return {entry.name: entry for entry in entries}


def _entries(raw: bytes, path: Path) -> list[TensorEntry]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged: its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise ArtifactError(f"{path} is damaged: its header is not a JSON object")
    header.pop("__metadata__", None)
    if len(header) > MOST_TENSORS:
        raise ArtifactError(f"{path} names {len(header)} tensors, more than {MOST_TENSORS}")
    return [_entry(name, fields, path) for name, fields in header.items()]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _entry(name: str, fields: Any, path: Path) -> TensorEntry:
    def refuse(problem: str) -> ArtifactError:
        return ArtifactError(f"{path} is damaged: tensor {name[:200]!r} {problem}")

    if len(name) > LONGEST_NAME or not name.isprintable():
        raise refuse(f"has a name that is longer than {LONGEST_NAME} or cannot be printed")
    if not isinstance(fields, dict):
        raise refuse("has no description")
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"has the unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape) or len(shape) > MAX_AXES:
        raise refuse("has no valid shape")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse("has no valid data_offsets")
    bits = prod(shape) * DTYPE_BITS[dtype]
    if (offsets[1] - offsets[0]) * 8 != bits:
        raise refuse(
            f"of shape {shape} and dtype {dtype} needs {bits // 8} bytes, "
            f"its data_offsets span {offsets[1] - offsets[0]}"
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1], path.name)


def _naturals(value: Any) -> TypeGuard[list[int]]:
    """Whether the value is a list of integers in [0, 2^63)."""
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 2**63 for v in value)


def _check_extents(entries: list[TensorEntry], data_bytes: int, path: Path) -> None:
    """Tensors must tile the data without holes or overlaps, up to the end of the file."""
    position = 0
    for entry in entries:
        if entry.begin != position:
            raise ArtifactError(
                f"{path} is damaged: tensor {entry.name[:200]!r} starts at byte {entry.begin} of "
                f"the data, expected {position}"
            )
        if entry.end > data_bytes:
            raise ArtifactError(
                f"{path} is truncated: tensor {entry.name[:200]!r} ends at byte {entry.end} of "
                f"the data, the file has {data_bytes}"
            )
        position = entry.end
    if position != data_bytes:
        raise ArtifactError(
            f"{path} is damaged: {data_bytes - position} bytes at its end belong to no tensor"
        )
