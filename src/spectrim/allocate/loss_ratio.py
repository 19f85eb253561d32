"""SVD-LLM V2's allocation: less is removed where truncation costs more (arXiv 2503.12340).

Targets of one projection type share the type's budget over all blocks. With `L_i` the truncation
error `‖(W - W_k) X‖_F` at the uniform rank and `l_i = 1 / log L_i`, a target loses the share

    R_i = (1 - keep) N l_i / sum_j l_j        of its bytes, N targets in the type.

Differences from the paper, which has no code: the logarithm is of `e + L_i`, which is the same
for the paper's errors (about 1e7, over unnormalised moments) and stays positive for small ones;
shares are weighted by bytes where shapes differ; a share never exceeds 0.98 or what the least
rank allows, and what clipping leaves is removed from the others of the type.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spectrim.allocate.budget import budget_bytes
from spectrim.allocate.curve import Curve, loss_by_rank, tail_energy
from spectrim.allocate.ladder import (
    Ladder,
    Limits,
    budget_for,
    ladders_for,
    plan_from_levels,
    spend,
)
from spectrim.allocate.plan import Plan
from spectrim.allocate.uniform import largest_remainders, levels_for_shares

LARGEST_REMOVAL = 0.98
"""No target loses a larger share of its bytes."""


def loss_ratio(
    curves: Sequence[Curve], *, keep: float, limits: Limits | None = None, fill: bool = True
) -> Plan:
    """Share the budget of each projection type by `1 / log(truncation error)`.

    Args:
        curves: the targets with their spectra (sums over calibration tokens, as published).
        keep: fraction of the dense target bytes to keep.
        limits: what the plan may contain.
        fill: spend what rounding leaves over.

    Raises:
        BudgetError: if the keep is below what the limits allow.
        InputError: if a spectrum is missing.
    """
    ladders = ladders_for(curves, limits or Limits())
    budget = budget_for(ladders, keep)
    shares = np.empty(len(ladders))
    for projection in sorted({c.projection for c in curves}):
        members = [i for i, c in enumerate(curves) if c.projection == projection]
        shares[members] = _type_shares([ladders[i] for i in members], keep)
    levels = levels_for_shares(ladders, shares, budget)
    if fill:
        levels = spend(ladders, levels, budget, largest_remainders(ladders, levels, shares))
    losses = [loss_by_rank(c, "energy") for c in curves]
    return plan_from_levels(ladders, levels, keep=keep, rule="loss_ratio", losses=losses)


def water_fill(pull: np.ndarray, caps: np.ndarray, sizes: np.ndarray, goal: float) -> np.ndarray:
    """Shares proportional to `pull`, none above its cap, with `sum(shares * sizes) = goal`.

    Where the caps do not allow the goal, all shares are at their caps.
    """
    free = np.ones(pull.size, dtype=bool)
    shares = caps.copy()
    while free.any():
        rest = goal - float((caps * sizes)[~free].sum())
        shares[free] = pull[free] * rest / float((pull * sizes)[free].sum())
        over = free & (shares > caps)
        if not over.any():
            break
        shares[over] = caps[over]
        free &= ~over
    return np.maximum(shares, 0.0)


def _type_shares(ladders: Sequence[Ladder], keep: float) -> np.ndarray:
    """Kept share of every target of one projection type.

    A target of low rank that the uniform share holds without loss gets what it takes, no less and
    no more; the published rule, which sees no error there, would take most of it away.
    """
    sizes = np.array([x.dense_bytes for x in ladders], dtype=np.float64)
    caps = np.array([min(LARGEST_REMOVAL, 1 - x.bytes[0] / x.dense_bytes) for x in ladders])
    whole = np.array([1 - x.bytes[x.enough] / x.dense_bytes for x in ladders])
    fits = np.array([removed > 0 and removed >= 1 - keep for removed in whole])
    removed = np.where(fits, whole, 0.0)
    goal = (1 - keep) * float(sizes.sum()) - float((removed * sizes).sum())
    others = [i for i, fit in enumerate(fits) if not fit]
    if others and goal > 0:
        errors = np.array([_truncation_error(ladders[i], keep) for i in others])
        removed[others] = water_fill(1 / np.log(np.e + errors), caps[others], sizes[others], goal)
    return 1 - removed


def _truncation_error(ladder: Ladder, keep: float) -> float:
    """`‖(W - W_k) X‖_F` at the rank that the uniform rule would give."""
    level = max(0, ladder.level_within(budget_bytes(keep, ladder.dense_bytes)))
    if level == ladder.top:
        return 0.0
    return float(np.sqrt(tail_energy(ladder.curve)[ladder.ranks[level]]))
