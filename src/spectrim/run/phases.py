"""What every phase of a run holds in memory, counted from the sizes of a model.

Weights are there all along; on top of them comes the largest phase. The workspace of a
decomposition, in numbers of 8 bytes, is

    a p² + b m n + c n²,   p = min(m, n)

with coefficients measured on this library's decompositions of matrices of several shapes.
"""

from __future__ import annotations

from dataclasses import dataclass

from spectrim.decompose import OBJECTIVES
from spectrim.model.tail import LOGITS_AT_ONCE
from spectrim.moments.gradients_by_block import streams_held
from spectrim.moments.symmetric import panel_numbers
from spectrim.recipe import (
    BlockRefinement,
    ClosedFormRefinement,
    ProjectedGradientRefinement,
    Recipe,
)
from spectrim.run.footprint import Room, Setting, Sizes

_WORKSPACE = {"plain": (0.0, 6.0, 0.0), "whitened": (1.0, 5.6, 1.1), "anchored": (9.5, 5.0, 5.5)}
"""Coefficients (a, b, c) by family of objectives."""

_FAMILY = {"fisher": "plain", "activation": "plain", "shifted": "whitened"}


@dataclass(frozen=True)
class Phase:
    """What one phase of a run holds besides the weights, bytes.

    Attributes:
        streams: hidden states, on the host or in files.
        parts: everything else, where blocks are worked on.
    """

    streams: int
    parts: dict[str, int]


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


def has_gradients(recipe: Recipe, *, planned: bool) -> tuple[bool, bool]:
    """Whether a recipe gathers gradient moments, and whether it takes gradients at all.

    Args:
        recipe: resolved.
        planned: whether the ranks are given, so that nothing is scored.
    """
    gathered = bool(OBJECTIVES[recipe.decompose.objective].outputs)
    scored = not planned and recipe.allocate.needed_scores & {"first_order", "second_order"}
    return gathered, bool(gathered or scored)


def _stream(setting: Setting, sizes: Sizes) -> int:
    return setting.windows * setting.window_length * sizes.width * setting.working.itemsize


def _own(sizes: Sizes) -> int:
    """Numbers in one block's gradient moments `G` and its input moments `C`, folded."""
    outputs = [m for m, _ in sizes.linears]
    return sum(map(panel_numbers, (*outputs, *sizes.inputs, *sizes.routed)))


def _step(sizes: Sizes, *, crossed: bool) -> int:
    """Numbers in the moments that a sequential flow takes of all experts at the same time."""
    squares = {n: panel_numbers(n) + crossed * n * n for n in set(sizes.routed)}
    return max((squares[n] * sizes.routed.count(n) for n in squares), default=0)


GRAPH_NUMBERS = 1.25
"""Numbers of a block's graph per token, in its widths: the states four times, and every linear's
input and output. Measured on blocks of several architectures."""


def gradient_phase(recipe: Recipe, setting: Setting, sizes: Sizes, room: Room) -> Phase:
    """The backward pass: activations of one block or of all, and a piece of the logits."""
    working = setting.working.itemsize
    tokens = min(room.graph, setting.windows) * setting.window_length
    graph = GRAPH_NUMBERS * (4 * sizes.width + sum(m + n for m, n in sizes.linears))
    running = sizes.blocks if room.backward == "whole" else 1
    parts = {
        "activations": int(tokens * graph * running * working),
        "logits": 4 * 4 * min(LOGITS_AT_ONCE, tokens * sizes.vocabulary),
    }
    if room.backward == "recomputed":
        parts["states"] = tokens * sizes.width * sizes.blocks * working
    if "G" in OBJECTIVES[recipe.decompose.objective].outputs:
        blocks = 1 if room.backward == "by block" else sizes.blocks
        parts["gradient moments"] = 4 * blocks * _own(sizes)
    if recipe.allocate.needed_scores & {"first_order", "second_order"}:
        parts["components"] = _components(sizes)
    parts |= _originals(recipe, setting, sizes)
    if room.backward != "by block":
        return Phase(0, parts)
    return Phase(streams_held(sizes.blocks) * _stream(setting, sizes), parts)


def _components(sizes: Sizes) -> int:
    """All components of all targets, fp32."""
    return 4 * sizes.blocks * sum(min(m, n) * (m + n) for m, n in sizes.linears)


def _originals(recipe: Recipe, setting: Setting, sizes: Sizes) -> dict[str, int]:
    """Weights that cutting in stages goes back to."""
    if _correction(recipe) is None:
        return {}
    return {"originals": setting.stored.itemsize * _weights(sizes)}


def _correction(recipe: Recipe) -> ProjectedGradientRefinement | None:
    step = recipe.first(ProjectedGradientRefinement)
    return None if step is None or step.stages == 1 else step


def _weights(sizes: Sizes) -> int:
    return sizes.blocks * sum(m * n for m, n in sizes.linears)


def correction_phase(recipe: Recipe, setting: Setting, sizes: Sizes) -> Phase:
    """Between two stages: the components that were kept, and gradients of all weights."""
    step = _correction(recipe)
    if step is None:
        return Phase(0, {})
    kept = {"components": 4 * _weights(sizes), "gradients": 4 * step.windows * _weights(sizes)}
    return Phase(0, kept | _originals(recipe, setting, sizes))


def _streams(recipe: Recipe) -> int:
    """Streams that exist at the same time."""
    if recipe.flow == "sequential":
        # Original and shifted; what a block is trained towards is a third one.
        return 2 + (recipe.first(BlockRefinement) is not None)
    return int(bool(OBJECTIVES[recipe.decompose.objective].original))


def cut_phase(recipe: Recipe, setting: Setting, sizes: Sizes, room: Room) -> Phase:
    """Moments and decomposition of a block's targets, beside what other blocks wait for."""
    working = setting.working.itemsize
    objective = recipe.decompose.objective
    gathers = OBJECTIVES[objective]
    tokens = min(room.batch, setting.windows) * setting.window_length
    if not gathers.inputs:
        tokens = 0
    family = _FAMILY.get(objective, objective)
    a, b, c = _WORKSPACE.get(family, _WORKSPACE["anchored"])
    workspace = max(int(8 * (a * min(m, n) ** 2 + b * m * n + c * n * n)) for m, n in sizes.linears)
    parts = {
        "decomposition": workspace,
        "activations": tokens * (2 * sizes.width + sizes.widest) * working,
    }
    widest = max((*sizes.inputs, *sizes.routed))
    folded = 8 * sum(map(panel_numbers, sizes.inputs)) + 4 * sum(map(panel_numbers, sizes.routed))
    matrices = folded + 8 * widest**2 if "C" in gathers.inputs else 0
    if recipe.flow == "sequential":
        kinds = (
            3 if "cross" in gathers.inputs else 1 + (recipe.first(ClosedFormRefinement) is not None)
        )
        matrices = 8 * kinds * widest**2 + 4 * _step(sizes, crossed="cross" in gathers.inputs)
        parts["copy of the block"] = sizes.block * working
        if not setting.offloaded and not room.restarts:
            held = 2 * sizes.width + sizes.widest
            paused = setting.windows * setting.window_length * held * working
            parts["paused forwards"] = 2 * paused
    elif recipe.allocate.needed_scores:
        parts["components"] = _components(sizes)
        parts |= _originals(recipe, setting, sizes)
    parts["moments"] = matrices
    if "G" in gathers.outputs and room.backward != "by block":
        parts["gradient moments"] = 4 * sizes.blocks * _own(sizes)
    return Phase(_streams(recipe) * _stream(setting, sizes), parts)
