"""Compare checkpoint files with the skeleton that is waiting for them, before weights are read.

transformers only warns about a tensor that is missing and fills its place with random numbers.
For a compressed layer that is never what anybody wants: it is refused here, like a truncated file
or a shape that does not fit, naming the file and the tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from spectrim.errors import ArtifactError
from spectrim.layers.layout import layout_of
from spectrim.layers.swap import compressed_layers
from spectrim.storage.headers import TensorEntry, read_header

__all__ = ["check_files", "check_orders"]


def check_files(model: Any, quantizer: Any, files: Iterable[str]) -> None:
    """Refuse damaged files and files that do not hold every tensor of every compressed layer.

    Args:
        model: the skeleton, compressed layers in place.
        quantizer: supplies our renamings.
        files: the checkpoint's shards.

    Raises:
        ArtifactError: names the file and the tensor.
    """
    paths = [Path(file) for file in files]
    for file in paths:
        if file.suffix != ".safetensors":
            raise ArtifactError(f"{file} is not a safetensors file; spectrim reads nothing else")
    found = _in_memory_names(model, quantizer, paths)
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    for name, layer in compressed_layers(model).items():
        for key, expected in layer.state_dict().items():
            entry = found.get(f"{name}.{key}".removeprefix(prefix))
            if entry is None:
                raise ArtifactError(
                    f"{paths[0].parent} lacks the tensor {key!r} of the compressed layer {name}; "
                    "the folder is incomplete or its config.json belongs to another result"
                )
            if entry.shape != tuple(expected.shape):
                raise ArtifactError(
                    f"{entry.file}: tensor {entry.name!r} has shape {list(entry.shape)}, the "
                    f"configuration asks for {list(expected.shape)}"
                )
            if entry.dtype.startswith(("I", "U")) == expected.is_floating_point():
                raise ArtifactError(
                    f"{entry.file}: tensor {entry.name!r} has dtype {entry.dtype}, the layer "
                    f"holds {expected.dtype}"
                )


def check_orders(model: Any) -> None:
    """Refuse a stored order that is no permutation: its indices would lead out of the layer.

    Raises:
        ArtifactError: names the tensor.
    """
    for name, layer in compressed_layers(model).items():
        for key in layout_of(layer.storage, layer.weights).integers:
            order = layer.get_buffer(key)
            if order.is_meta:
                continue  # offloaded to disk; the gather itself checks its bounds
            expected = torch.arange(order.numel(), device=order.device)
            if not torch.equal(order.sort().values.long(), expected):
                raise ArtifactError(f"the tensor '{name}.{key}' is not a permutation")


def _in_memory_names(model: Any, quantizer: Any, files: list[Path]) -> dict[str, TensorEntry]:
    """Name in memory, without the base model's prefix -> tensor on disk."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    conversions = get_model_conversion_mapping(model, None, quantizer)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    found = {}
    for file in files:
        for key, entry in read_header(file).items():
            name = key
            for renaming in renamings:
                name, _ = renaming.rename_source_key(name)
            found[name.removeprefix(prefix)] = entry
    return found
