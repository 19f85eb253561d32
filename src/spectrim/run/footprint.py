"""What a run holds in memory, counted from the shapes in a configuration.

Weights are there all along; on top of them comes the largest phase. The workspace of a
decomposition, in numbers of 8 bytes, is

    a p² + b m n + c n²,   p = min(m, n)

with coefficients measured on this library's decompositions of matrices of several shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectrim.decompose import OBJECTIVES
from spectrim.model.onload import unit_names
from spectrim.model.recompute import LARGE
from spectrim.model.tail import LOGITS_AT_ONCE
from spectrim.model.weights import get_module, is_linear
from spectrim.moments.gradients_by_block import streams_held
from spectrim.recipe import ClosedFormRefinement, Recipe
from spectrim.run.survey.planning import needed_scores

__all__ = ["Phase", "Setting", "Sizes", "phases", "read_sizes", "weight_parts"]

_WORKSPACE = {"plain": (0.0, 6.0, 0.0), "whitened": (1.0, 5.6, 1.1), "anchored": (9.5, 5.0, 5.5)}
"""Coefficients (a, b, c) by family of objectives."""

_FAMILY = {"fisher": "plain", "activation": "plain", "shifted": "whitened"}


@dataclass(frozen=True)
class Setting:
    """Where and how a run will work."""

    device: torch.device
    working: torch.dtype
    stored: torch.dtype
    out_of_core: bool
    offloaded: bool
    windows: int
    window_length: int


@dataclass(frozen=True)
class Sizes:
    """What the skeleton says: numbers of parameters, and the linears of the largest block."""

    width: int
    vocabulary: int
    blocks: int
    block: int
    other: int
    linears: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]

    @property
    def widest(self) -> int:
        """Largest input plus output of a linear: what an activation of a token takes."""
        return max(m + n for m, n in self.linears)


@dataclass(frozen=True)
class Phase:
    """What one phase of a run holds besides the weights, bytes.

    Attributes:
        streams: hidden states, on the host or in files.
        parts: everything else, where blocks are worked on.
    """

    streams: int
    parts: dict[str, int]


def read_sizes(config: Any, trust_remote_code: bool) -> Sizes:
    """Sizes of the model that a configuration describes; no weight is made."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
    blocks = [get_module(skeleton, name) for name in unit_names(skeleton)]
    largest = max(blocks, key=_parameters)
    linears, inputs = [], []
    for parent in largest.modules():
        own = [m for m in parent.children() if is_linear(m)]
        shapes = [_shape(m) for m in own]
        linears += shapes
        for width in dict.fromkeys(n for _, n in shapes):
            alike = sum(n == width for _, n in shapes)
            # Three or more of one width are an attention's: its output projection stands alone.
            inputs += [width] * (2 if alike > 2 else 1)
    embedding = skeleton.get_input_embeddings().weight
    inside = sum(map(_parameters, blocks))
    return Sizes(
        width=embedding.shape[1],
        vocabulary=embedding.shape[0],
        blocks=len(blocks),
        block=_parameters(largest),
        other=_parameters(skeleton) - inside,
        linears=tuple(linears),
        inputs=tuple(inputs),
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _shape(linear: Any) -> tuple[int, int]:
    return (
        (linear.out_features, linear.in_features)
        if isinstance(linear, nn.Linear)
        else (tuple(reversed(linear.weight.shape)))
    )


def weight_parts(setting: Setting, sizes: Sizes) -> dict[str, int]:
    """Weights that are in memory while a block is worked on."""
    working, stored = setting.working.itemsize, setting.stored.itemsize
    if not setting.out_of_core:
        every = (sizes.other + sizes.blocks * sizes.block) * working
        return {"weights": every}
    return {
        "embeddings and head": sizes.other * working,
        "block": sizes.block * working,
        "next block": sizes.block * stored,
    }


def phases(recipe: Recipe, setting: Setting, sizes: Sizes, *, planned: bool) -> list[Phase]:
    """Phases of a run: the gradient pass where there is one, and the cut.

    Args:
        recipe: resolved.
        setting: where and how it runs.
        sizes: of the model.
        planned: whether the ranks are given, so that nothing is scored.
    """
    cut = _cut(recipe, setting, sizes)
    gathered = OBJECTIVES[recipe.decompose.objective].needs & {"G", "fisher"}
    scored = not planned and needed_scores(recipe.allocate) & {"first_order", "second_order"}
    if not gathered and not scored:
        return [cut]
    by_block = setting.out_of_core or sizes.blocks * sizes.block + sizes.other >= LARGE
    gradients = _gradients(recipe, setting, sizes, by_block=by_block)
    if gathered:
        # Of a large model one block's moments at a time: the others lie in the work folder.
        own = sum(m * m for m, _ in sizes.linears) + sum(n * n for n in sizes.inputs)
        gradients.parts["gradient moments"] = 8 * own * (1 if by_block else sizes.blocks)
        if not by_block:
            cut.parts["gradient moments"] = 8 * own * sizes.blocks
    return [gradients, cut]


def _stream(setting: Setting, sizes: Sizes) -> int:
    return setting.windows * setting.window_length * sizes.width * setting.working.itemsize


def _gradients(recipe: Recipe, setting: Setting, sizes: Sizes, *, by_block: bool) -> Phase:
    """The backward pass: activations of one block or of all, and the loss's logits."""
    tokens = min(recipe.calibration.batch, setting.windows) * setting.window_length
    running = 1 if by_block else sizes.blocks
    held = 4 * sizes.width + sum(m + n for m, n in sizes.linears)
    logits = min(LOGITS_AT_ONCE, tokens * sizes.vocabulary)
    parts = {
        "activations": tokens * held * running * setting.working.itemsize,
        "logits": 4 * 4 * logits,  # as computed, in fp32, their softmax and its gradient
    }
    return Phase(streams_held(sizes.blocks) * _stream(setting, sizes) if by_block else 0, parts)


def _streams(recipe: Recipe) -> int:
    """Streams that exist at the same time."""
    if recipe.flow == "sequential":
        return 3  # original, shifted, and the original behind the block
    return 1 if OBJECTIVES[recipe.decompose.objective].needs & {"C", "absolute"} else 0


def _cut(recipe: Recipe, setting: Setting, sizes: Sizes) -> Phase:
    """Moments and decomposition of a block's targets."""
    working = setting.working.itemsize
    objective = recipe.decompose.objective
    needs = OBJECTIVES[objective].needs
    tokens = min(recipe.calibration.batch, setting.windows) * setting.window_length
    if not needs & {"C", "shifted", "cross", "absolute"}:
        tokens = 0
    family = _FAMILY.get(objective, objective)
    a, b, c = _WORKSPACE.get(family, _WORKSPACE["anchored"])
    workspace = max(int(8 * (a * min(m, n) ** 2 + b * m * n + c * n * n)) for m, n in sizes.linears)
    parts = {
        "decomposition": workspace,
        "activations": tokens * (2 * sizes.width + sizes.widest) * working,
    }
    matrices = 8 * sum(n * n for n in sizes.inputs) if needs & {"C"} else 0
    if recipe.flow == "sequential":
        kinds = (
            3
            if "cross" in needs
            else 1 + any(isinstance(s, ClosedFormRefinement) for s in recipe.refine)
        )
        matrices = 8 * kinds * max(sizes.inputs) ** 2
        parts["copy of the block"] = sizes.block * working
        if not setting.offloaded:
            held = 2 * sizes.width + sizes.widest
            paused = setting.windows * setting.window_length * held * working
            parts["paused forwards"] = 2 * paused
    parts["moments"] = matrices
    return Phase(_streams(recipe) * _stream(setting, sizes), parts)
