"""From one target's decomposition to the layer that replaces it, with its errors."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.allocate.plan import PlanEntry
from spectrim.decompose import OBJECTIVES, decompose
from spectrim.decompose.anchored import anchored_map
from spectrim.decompose.balance import balanced
from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.kfac import output_root
from spectrim.formats.number_format import Coded
from spectrim.layers.layout import layout_of
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.source import Source
from spectrim.linalg.exact_rank import exact_rank
from spectrim.linalg.scaling import row_and_column_sizes
from spectrim.model.anatomy import Target
from spectrim.model.weights import is_transposed, read_bias, read_weight
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.recipe import BlockRefinement, Decompose, DistillRefinement, Recipe
from spectrim.storage.survey_record import Factors

FEW_BITS = 4
"""Codes of more bits are so fine that numbers are better trained first and rounded then."""


def decompose_target(
    target: Target,
    W: Tensor,
    choice: Decompose,
    moments: Moments | None,
    output: OutputMoments | None = None,
    *,
    rank: int | None = None,
) -> Decomposition:
    """Ordered components of one target for the recipe's objective."""
    return decompose(
        choice.objective,
        W,
        moments,
        output,
        name=target.name,
        rank=rank,
        **OBJECTIVES[choice.objective].accepted(choice.model_dump()),
    )


def cut_layer(
    original: nn.Module, decomposition: Decomposition | Factors, rank: int, *, balance: bool
) -> LowRankLinear:
    """The rank-k layer in the original's dtype and device; cast once, here.

    `balance` spreads the singular values over both factors, which training needs (Adam is not
    scale-invariant).
    """
    up, down = decomposition.cut(rank)
    if balance:
        up, down = balanced(up, down)
    return stand_in(original, up, down)


def stand_in(original: nn.Module, up: Tensor, down: Tensor) -> LowRankLinear:
    """Factors as a layer in the place of `original`: its dtype, device, bias, orientation, mode."""
    weight = read_weight(original)
    layer = LowRankLinear.from_factors(
        up, down, read_bias(original), dtype=weight.dtype, device=weight.device
    )
    # Where the dense layer comes back one day, it has to store its weight as the original did.
    layer.transposed = is_transposed(original)
    return layer.train(original.training)


def measured_error(W: Tensor, layer: Any, moments: Moments | None) -> float:
    """Relative squared error of the stored layer: on the moments' inputs, or of the weight itself.

    With shifted moments and a cross moment it is `‖W X − W' X'‖² / ‖W X‖²`, and where the output
    joins the residual stream what that lacks behind the sum, over the same; 0 where the layer's
    output is zero on all of its inputs.
    """
    W = W.to(torch.float64)
    approximation = layer.dense_weight().to(W.device, torch.float64)
    difference = W - approximation
    C, shifted, cross = (
        (None, None, None) if moments is None else (moments.C, moments.shifted, moments.cross)
    )
    if moments is not None and moments.deficit is not None and shifted is not None:
        assert moments.deficit_square is not None  # they are summed together
        seen = shifted if C is None else C
        energy = ((W @ seen) * W).sum()
        error = moments.deficit_square.trace().double() + 2 * (difference * moments.deficit).sum()
        error += ((difference @ shifted) * difference).sum()
    elif C is not None and shifted is not None and cross is not None:
        energy = ((W @ C) * W).sum()
        mixed = ((W @ cross) * approximation).sum()
        error = energy - 2 * mixed + ((approximation @ shifted) * approximation).sum()
    elif C is not None or shifted is not None:
        seen = C if C is not None else shifted
        assert seen is not None
        energy = ((W @ seen) * W).sum()
        error = ((difference @ seen) * difference).sum()
    else:
        energy, error = W.square().sum(), difference.square().sum()
    return float(error / energy) if energy > 0 else 0.0


def replace_target(
    target: Target,
    original: nn.Module,
    entry: PlanEntry,
    choice: Decompose,
    moments: Moments | None,
    output: OutputMoments | None,
    *,
    balance: bool,
    at_once: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """The layer for one plan entry and its facts for the report; dense entries stay as they are.

    With `at_once` it is made as it will be stored, so that what follows sees what rounding did.
    """
    if at_once:
        return _stored_target(target, original, entry, choice, moments, output)
    rank = entry.components
    if rank is None:
        return original, {"predicted_error": 0.0, "measured_error": 0.0, "seconds": 0.0}
    started = time.perf_counter()
    W = read_weight(original).detach().to(torch.float64)
    exact = exact_rank(W, name=target.name)
    if exact is not None and exact <= rank:
        # Nothing has to be lost, so nothing is weighed: like a dense target it stays as it is.
        choice = Decompose(objective="plain")
    decomposition = decompose_target(target, W, choice, moments, output, rank=rank)
    layer = cut_layer(original, decomposition, rank, balance=balance)
    return layer, _facts(started, W, layer, moments, decomposition)


def _facts(
    started: float,
    W: Tensor,
    layer: nn.Module,
    moments: Moments | None,
    found: Decomposition | None,
) -> dict[str, Any]:
    """What the report says of a layer that was made; None where nothing was cut."""
    facts = {
        "predicted_error": 0.0 if found is None else found.relative_error(found.rank),
        "measured_error": measured_error(W, layer, moments),
        "damping": 0.0 if found is None else found.damping,
        "seconds": time.perf_counter() - started,
    }
    if found is not None and found.ridge is not None:
        facts["ridge"] = found.ridge
    if moments is not None and moments.pooled is not None:
        facts["expert_tokens"] = moments.tokens if moments.pooled < 1 else 0
        facts["pooled_share"] = moments.pooled
    return facts


def rounds_at_cut(recipe: Recipe, entry: PlanEntry) -> bool:
    """Whether a target is rounded to integers where it is cut, for later ones to make up for it.

    Sequential flows do so. What is trained afterwards is rounded at the end if that costs next to
    nothing; of few bits the codes stay, and scales are trained. What is solved for again is rounded
    at the end. A base and its residual are made for each other, and once.
    """
    layout = layout_of(entry.storage, entry.weights)
    if recipe.flow != "sequential" or not layout.coded:
        return False
    if not recipe.refine or entry.corrected:
        return True
    frozen = all(isinstance(s, BlockRefinement | DistillRefinement) for s in recipe.refine)
    few = (isinstance(r, Coded) and r.bits <= FEW_BITS for r in layout.formats.values())
    return frozen and all(few)


def _stored_target(
    target: Target,
    original: nn.Module,
    entry: PlanEntry,
    choice: Decompose,
    moments: Moments | None,
    output: OutputMoments | None,
) -> tuple[nn.Module, dict[str, Any]]:
    """The layer in its stored form, rounded in the metric of the inputs that it will see."""
    started = time.perf_counter()
    weight = read_weight(original).detach()
    found = factors = None
    if (rank := entry.components) is not None:
        found = decompose_target(target, weight.double(), choice, moments, output, rank=rank)
        factors = found.cut(rank)
    source = source_of(target, original, choice, moments, output, factors)
    kind = layout_of(entry.storage).layer_class()
    layer = kind.stored(source, entry.rank, entry.weights, dtype=weight.dtype)
    layer.transposed = is_transposed(original)
    facts = _facts(started, weight, layer, moments, found)
    return layer.train(original.training), facts


def source_of(
    target: Target,
    original: nn.Module,
    choice: Decompose,
    moments: Moments | None,
    output: OutputMoments | None,
    factors: tuple[Tensor, Tensor] | None,
) -> Source:
    """What the stored layer of a target stands for, on the inputs that it will see.

    On a shifted stream that is the least-squares map to the original outputs, as for the anchored
    objectives; `blend` says how far it goes from the weight to it, `ridge` what pulls it back.
    """
    name, W = target.name, read_weight(original).detach().double()
    C = G = None
    if moments is not None:
        C = moments.C if moments.shifted is None else moments.shifted
        if C is not None:
            G = output_metric(target, W, choice, output)
        if moments.cross is not None or moments.deficit is not None:
            options = {"blend": choice.blend, "ridge": choice.ridge}
            W = anchored_map(W, moments, name=name, **options).V
    return Source(target.name, W, read_bias(original), factors, C, G)


def output_metric(
    target: Target, W: Tensor, choice: Decompose, output: OutputMoments | None
) -> Tensor | None:
    """What errors of a target's outputs cost, (out, out) fp64; None where that is not known."""
    if output is None or output.G is None:
        return None
    rows, _ = row_and_column_sizes(W)
    root = output_root(output, rows, choice.shrink_out, name=target.name)
    return None if root is None else root[0] @ root[0].mT
