"""Models larger than memory: blocks are read from the shards when they are worked on.

Everything that is decided block by block can be done so, gradients of one backward pass included.
What trains all blocks together or evaluates the model again and again cannot, and is refused here
before anything is read.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.allocate.sensitivity import TABLE
from spectrim.errors import ArtifactError, InputError, ModelError
from spectrim.model.onload import Onloader, unit_names
from spectrim.model.weights import check_finite, get_module
from spectrim.recipe import DistillRefinement, LoraRefinement, ProjectedGradientRefinement, Recipe
from spectrim.storage.conversions import Conversions
from spectrim.storage.shards import Shards

_WAY_OUT = (
    "run it in memory (--in-memory), or choose a recipe that works block by block: spectrim, "
    "aa-svd, svd-llm"
)


def check_out_of_core(recipe: Recipe, *, planned: bool = False, own_text: bool = False) -> None:
    """Refuse a recipe that needs the whole model in memory.

    Args:
        recipe: resolved.
        planned: whether the ranks are given, so that the recipe's rule plays no part.
        own_text: whether the calibration text is given as documents or tokens.

    Raises:
        InputError: says which part of the recipe it is and what to do.
    """
    reason = _reason(recipe, planned)
    if reason is not None:
        raise InputError(f"recipe {recipe.name!r} cannot be run out of core: {reason}; {_WAY_OUT}")
    if not own_text and _calibrates(recipe):
        _check_text(recipe)


def check_survey_out_of_core(
    recipe: Recipe, scores: Collection[str] | None = None, *, own_text: bool = False
) -> None:
    """Refuse a survey that runs the whole model again and again.

    Args:
        recipe: resolved; its rule asks for scores too.
        scores: that the user asks for.
        own_text: whether the calibration text is given as documents or tokens.

    Raises:
        InputError: names the score.
    """
    repeated = sorted({*(scores or ()), *recipe.allocate.needed_scores} & {"measured", TABLE})
    if repeated:
        raise InputError(
            f"the score {repeated[0]!r} evaluates the model once for every target, which cannot be "
            "done out of core; survey in memory (--in-memory), or without it"
        )
    if not own_text:
        _check_text(recipe)


def _check_text(recipe: Recipe) -> None:
    text = recipe.calibration.text
    if "self" in ([text] if isinstance(text, str) else text):
        raise InputError(
            f"recipe {recipe.name!r} cannot be run out of core: the calibration text 'self' is "
            "sampled token by token, which reads the whole checkpoint for every token; give a "
            "text (--text FILE)"
        )


def _calibrates(recipe: Recipe) -> bool:
    return recipe.flow != "one-shot" or bool(recipe.refine) or recipe.reads_text


def _reason(recipe: Recipe, planned: bool) -> str | None:
    if recipe.flow == "learned":
        return "the flow 'learned' trains all blocks together"
    for step in recipe.refine:
        if isinstance(step, (DistillRefinement, LoraRefinement)):
            return f"the refinement {step.step!r} trains all blocks together"
        if isinstance(step, ProjectedGradientRefinement) and step.stages > 1:
            return f"the refinement {step.step!r} moves all blocks together (one stage moves none)"
    scores = frozenset() if planned else recipe.allocate.needed_scores
    if scores & {"measured", TABLE}:
        return f"the rule {recipe.allocate.rule!r} evaluates the model once for every target"
    return None


def checkpoint_folder(name: str) -> Path:
    """The folder with a checkpoint's files, downloaded first where it is on the hub.

    Raises:
        ModelError: there is nothing of that name.
    """
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.safetensors", "*.safetensors.index.json", "*.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ModelError(f"{name!r} is no folder and cannot be downloaded: {error}") from error


def build_onloaded(
    folder: Path,
    config: Any,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Onloader]:
    """A model of which only embeddings, final norm and head are in memory.

    Raises:
        ArtifactError: a shard is missing or damaged.
        ModelError: no list of blocks, or a tensor of another shape than the configuration's.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    shards = Shards(folder)
    # Buffers are computed, not stored; they are small and stay on the device.
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code
        )
    conversions = Conversions(model, shards.names)
    units = unit_names(model)
    if not units:
        raise ModelError(f"{type(model).__name__} has no list of blocks with linear layers")
    made = conversions.read(shards.outline)
    missing = [n for unit in units for n in _state_names(model, unit) if n not in made]
    if missing:
        raise ArtifactError(f"{folder} holds no tensor for {missing[0]!r}")
    _load_rest(model, units, conversions, shards, device)
    _take_generation_config(model, folder)
    sources = {unit: partial(_read, conversions, shards, f"{unit}.") for unit in units}
    return model.eval(), Onloader(model, sources, device=device)


def _state_names(model: nn.Module, unit: str) -> list[str]:
    return [f"{unit}.{name}" for name in get_module(model, unit).state_dict()]


def _read(conversions: Conversions, shards: Shards, unit: str) -> dict[str, Tensor]:
    found = conversions.read(shards.read, within=unit)
    return {name.removeprefix(unit): tensor for name, tensor in found.items()}


def _load_rest(
    model: Any,
    units: tuple[str, ...],
    conversions: Conversions,
    shards: Shards,
    device: torch.device,
) -> None:
    """Everything that is not in a block, in memory; tied weights tied."""
    inside = tuple(f"{unit}." for unit in units)
    known = {n: like for n, like in model.state_dict().items() if not n.startswith(inside)}
    stored = conversions.read(shards.read, outside=inside)
    for name, found in stored.items():
        like = known[name]
        if found.shape != like.shape:
            raise ModelError(
                f"{name} is {tuple(found.shape)} in {shards.folder}, the configuration says "
                f"{tuple(like.shape)}"
            )
        owner, _, last = name.rpartition(".")
        place = model.get_submodule(owner)
        if last in place._parameters:
            value = nn.Parameter(found.to(device, like.dtype))
            check_finite(name, value)
            place._parameters[last] = value
        else:
            place._buffers[last] = found.to(device, like.dtype)
    for name, buffer in model.named_buffers():
        if not buffer.is_meta and buffer.device != device:
            owner, _, last = name.rpartition(".")
            model.get_submodule(owner)._buffers[last] = buffer.to(device)
    model.tie_weights(missing_keys=known.keys() - stored.keys(), recompute_mapping=False)
    absent = [n for n, p in model.named_parameters() if p.is_meta and not n.startswith(inside)]
    if absent:
        raise ArtifactError(f"{shards.folder} holds no tensor for {absent[0]!r}")


def _take_generation_config(model: Any, folder: Path) -> None:
    """What `from_pretrained` takes over from a checkpoint besides its weights."""
    from transformers import GenerationConfig

    model.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
