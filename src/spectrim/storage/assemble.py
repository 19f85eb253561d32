"""Write the folder of a model that is not in memory: the same files, one tensor at a time.

transformers' `save_pretrained` wants every tensor of a shard in memory. Here
names, tied weights and the division into shards follow its rules, on the meta device, and each
tensor is read, cast and written by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectrim.storage.conversions import to_disk
from spectrim.storage.tensor_file import Slot, write_tensors
from spectrim.storage.weight_files import INDEX_FILE, WEIGHTS_FILE


def save_in_parts(
    model: Any,
    folder: Path,
    read: Callable[[str], Tensor],
    *,
    max_shard_size: str | int = "5GB",
) -> None:
    """Write configuration and weights of a model, some of whose tensors are on the meta device.

    Args:
        model: a `PreTrainedModel`; dtypes and shapes of its tensors are those to be stored.
        folder: exists and is empty.
        read: gives the tensor of a name of the model that is on the meta device.
        max_shard_size: of one weight file.

    Raises:
        OSError: something cannot be written.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.get_state_dict_and_metadata(model)  # brings its table in line with the model
    _save_configuration(model, folder)
    state = saved_state(model)
    slots = _slots(model, state, read)
    pattern = WEIGHTS_FILE.replace(".safetensors", "{suffix}.safetensors")
    bare = {s.name: torch.empty(s.shape, dtype=s.dtype, device="meta") for s in slots.values()}
    split = split_torch_state_dict_into_shards(
        bare, filename_pattern=pattern, max_shard_size=max_shard_size
    )
    for name, inside in split.filename_to_tensors.items():
        write_tensors(folder / name, [slots[key] for key in inside], {"format": "pt"})
    if split.is_sharded:
        index = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_FILE).write_text(text, encoding="utf-8")


def _save_configuration(model: Any, folder: Path) -> None:
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def saved_state(model: Any) -> dict[str, Tensor]:
    """The state of a model, every tensor once, without what its architecture never saves."""
    state = model.state_dict()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        if parameters.get(target) is not None and parameters[target] is parameters.get(source):
            state.pop(target, None)
    for name in getattr(model, "_keys_to_ignore_on_save", None) or ():
        state.pop(name, None)
    return state


def _slots(model: Any, state: dict[str, Tensor], read: Callable[[str], Tensor]) -> dict[str, Slot]:
    """Every stored tensor: what it looks like, and how to get it when its turn comes."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        parts.setdefault(_part_of(name), {})[name] = tensor
    latest: tuple[str | None, dict[str, Tensor]] = (None, {})

    def fetch(part: str, stored: str) -> Tensor:
        nonlocal latest
        if latest[0] != part:
            latest = (None, {})  # first let go of one block, then read the next
            whole = {n: read(n) if t.is_meta else t for n, t in parts[part].items()}
            latest = (part, to_disk(model, whole))
        return latest[1][stored]

    slots: dict[str, Slot] = {}
    for part, tensors in parts.items():
        bare = {name: tensor.to("meta") for name, tensor in tensors.items()}
        for stored, tensor in to_disk(model, bare).items():
            slots[stored] = Slot(
                stored, tensor.dtype, tuple(tensor.shape), partial(fetch, part, stored)
            )
    return slots


def _part_of(name: str) -> str:
    """The member of the outermost list that a tensor lies in: what is converted at once."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if place is None else ".".join(parts[: place + 1])
