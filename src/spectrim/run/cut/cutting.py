"""From one target's decomposition to the layer that replaces it, with its errors."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.allocate.plan import PlanEntry
from spectrim.decompose import OBJECTIVES, decompose
from spectrim.decompose.balance import balanced
from spectrim.decompose.decomposition import Decomposition
from spectrim.layers.lowrank import LowRankLinear
from spectrim.linalg.exact_rank import exact_rank
from spectrim.model.anatomy import Target
from spectrim.model.weights import is_transposed, read_bias, read_weight
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.recipe import Decompose
from spectrim.storage.survey_record import Factors

__all__ = ["cut_layer", "decompose_target", "measured_error", "replace_target", "stand_in"]


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


def measured_error(W: Tensor, layer: LowRankLinear, moments: Moments | None) -> float:
    """Relative squared error of the stored layer: on the moments' inputs, or of the weight itself.

    With shifted moments and a cross moment it is `‖W X − W' X'‖² / ‖W X‖²`; 0 where the layer's
    output is zero on all of its inputs.
    """
    W = W.to(torch.float64)
    approximation = layer.dense_weight().to(W.device, torch.float64)
    difference = W - approximation
    C, shifted, cross = (
        (None, None, None) if moments is None else (moments.C, moments.shifted, moments.cross)
    )
    if C is not None and shifted is not None and cross is not None:
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
) -> tuple[nn.Module, dict[str, Any]]:
    """The layer for one plan entry and its facts for the report; dense entries stay as they are."""
    if entry.rank is None:
        return original, {"predicted_error": 0.0, "measured_error": 0.0, "seconds": 0.0}
    started = time.perf_counter()
    W = read_weight(original).detach().to(torch.float64)
    exact = exact_rank(W, name=target.name)
    if exact is not None and exact <= entry.rank:
        # Nothing has to be lost, so nothing is weighed: like a dense target it stays as it is.
        choice = Decompose(objective="plain")
    decomposition = decompose_target(target, W, choice, moments, output, rank=entry.rank)
    layer = cut_layer(original, decomposition, entry.rank, balance=balance)
    facts = {
        "predicted_error": decomposition.relative_error(entry.rank),
        "measured_error": measured_error(W, layer, moments),
        "damping": decomposition.damping,
        "seconds": time.perf_counter() - started,
    }
    if decomposition.ridge is not None:
        facts["ridge"] = decomposition.ridge
    if moments is not None and moments.pooled is not None:
        facts["expert_tokens"] = moments.tokens if moments.pooled < 1 else 0
        facts["pooled_share"] = moments.pooled
    return layer, facts
