"""Write the folder of a model that is not in memory: the same files, one tensor at a time.

transformers' `save_pretrained` wants every tensor of a shard in memory. Here
names, tied weights and the division into shards follow its rules, on the meta device, and each
tensor is read, cast and written by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectrim.storage.tensor_file import Slot, write_tensors
from spectrim.storage.weight_files import INDEX_FILE, WEIGHTS_FILE

__all__ = ["save_in_parts"]


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
    state = _without_ties(model)
    slots = {
        stored: Slot(
            stored,
            state[name].dtype,
            tuple(state[name].shape),
            lambda name=name: read(name) if state[name].is_meta else state[name],
        )
        for stored, name in _stored_names(model, state).items()
    }
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


def _without_ties(model: Any) -> dict[str, Tensor]:
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


def _stored_names(model: Any, state: dict[str, Tensor]) -> dict[str, str]:
    """Names on disk -> names in memory, in the order in which transformers divides them."""
    from transformers.core_model_loading import revert_weight_conversion

    # Renamings hand tensors through as they are; a size of its own tells each one apart.
    names = list(state)
    tags = {name: torch.empty(place, device="meta") for place, name in enumerate(names)}
    reverted = revert_weight_conversion(model, tags)
    return {stored: names[tag.numel()] for stored, tag in reverted.items()}
