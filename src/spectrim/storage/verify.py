"""Compare checkpoint files with the skeleton that is waiting for them, before weights are read.

transformers only warns about a tensor that is missing and fills its place with random numbers.
For a compressed layer that is never what anybody wants: it is refused here, like a truncated file
or a shape that does not fit, naming the file and the tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from spectrim.errors import ArtifactError
from spectrim.layers.layout import layout_of
from spectrim.layers.swap import compressed_layers
from spectrim.model.experts.unfold import expert_stacks
from spectrim.storage.headers import TensorEntry, read_header
from spectrim.storage.renaming import unfolded_conversions


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
    _check_places(model, paths)
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
            allowed = _DTYPES.get(expected.dtype, _FLOATS)
            if entry.dtype not in allowed:
                raise ArtifactError(
                    f"{entry.file}: tensor {entry.name!r} has dtype {entry.dtype}, the layer "
                    f"holds {' or '.join(allowed)}"
                )
    _check_complete(model, found, paths)


_FLOATS = ("F32", "BF16", "F16", "F64")
_DTYPES = {
    torch.int32: ("I32",),
    torch.int8: ("I8",),
    torch.uint8: ("U8",),
    torch.float8_e4m3fn: ("F8_E4M3",),
}


def _check_places(model: Any, paths: list[Path]) -> None:
    """Safetensors only, and inside the folder that was asked for: an index may name anything."""
    # A name of the hub is no folder, and its files lie in a cache under names of their own.
    name = Path(getattr(model.config, "_name_or_path", "") or ".")
    folder = _plain(name) if name.is_dir() else None
    for file in paths:
        if file.suffix != ".safetensors":
            raise ArtifactError(f"{file} is not a safetensors file; spectrim reads nothing else")
        inside = ".." not in file.parts if folder is None else _plain(file).is_relative_to(folder)
        if not inside:
            raise ArtifactError(f"the index of {name} names {file}, which lies outside of it")


def _plain(path: Path) -> Path:
    """An absolute path without `..`, links not followed: caches are full of links."""
    return Path(os.path.normpath(path.absolute()))


def _check_complete(model: Any, found: dict[str, TensorEntry], paths: list[Path]) -> None:
    """Every other weight of the base model must be there too: transformers makes up what is not.

    Weights that the architecture builds out of several tensors are transformers' own business,
    and so is a head that the checkpoint cannot have: it is of the bare model, or was saved with
    the head of another class.
    """
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    built = [
        re.compile(pattern)
        for conversion in unfolded_conversions(
            get_model_conversion_mapping(model), expert_stacks(model)
        )
        if not isinstance(conversion, WeightRenaming)
        for pattern in _patterns(conversion)
    ]
    headless = not any(entry.name.startswith(prefix) for entry in found.values())
    headless |= type(model).__name__ not in (model.config.architectures or ())
    own_head = model.base_model is model or not headless
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name, _ in model.named_parameters():
        bare = name.removeprefix(prefix)
        if bare in found or name in tied or any(p.search(name) for p in (*ignored, *built)):
            continue
        if not own_head and not name.startswith(prefix):
            continue
        raise ArtifactError(
            f"{paths[0].parent} lacks the tensor {name!r}, which would be random numbers; the "
            "folder is incomplete"
        )


def _patterns(conversion: Any) -> list[str]:
    targets = getattr(conversion, "target_patterns", ())
    return [targets] if isinstance(targets, str) else list(targets)


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
