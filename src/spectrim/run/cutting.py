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
from spectrim.model.anatomy import Target
from spectrim.model.weights import read_bias, read_weight
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.recipe import Decompose

__all__ = ["cut_layer", "decompose_target", "measured_error", "replace_target"]


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
    original: nn.Module, decomposition: Decomposition, rank: int, *, balance: bool
) -> LowRankLinear:
    """The rank-k layer in the original's dtype and device; cast once, here.

    `balance` spreads the singular values over both factors, which training needs (Adam is not
    scale-invariant).
    """
    up, down = decomposition.cut(rank)
    if balance:
        up, down = balanced(up, down)
    weight = read_weight(original)
    return LowRankLinear.from_factors(
        up, down, read_bias(original), dtype=weight.dtype, device=weight.device
    )


def measured_error(W: Tensor, layer: LowRankLinear, moments: Moments | None) -> float:
    """Relative squared error of the stored layer: on the moments' inputs, or of the weight itself.

    With shifted moments and a cross moment it is `‖W X − W' X'‖² / ‖W X‖²`.
    """
    W = W.to(torch.float64)
    approximation = layer.dense_weight().to(W.device, torch.float64)
    if moments is None:
        return float((W - approximation).square().sum() / W.square().sum())
    if moments.shifted is not None and moments.cross is not None and moments.C is not None:
        energy = ((W @ moments.C) * W).sum()
        mixed = ((W @ moments.cross) * approximation).sum()
        remaining = ((approximation @ moments.shifted) * approximation).sum()
        return float((energy - 2 * mixed + remaining) / energy)
    C = moments.C if moments.C is not None else moments.shifted
    assert C is not None
    difference = W - approximation
    return float(((difference @ C) * difference).sum() / ((W @ C) * W).sum())


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
    decomposition = decompose_target(target, W, choice, moments, output, rank=entry.rank)
    layer = cut_layer(original, decomposition, entry.rank, balance=balance)
    facts = {
        "predicted_error": decomposition.relative_error(entry.rank),
        "measured_error": measured_error(W, layer, moments),
        "damping": decomposition.damping,
        "seconds": time.perf_counter() - started,
    }
    return layer, facts
