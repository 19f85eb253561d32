"""Uniform allocation: every target keeps the same fraction of its bytes.

Without `fill` and for factored storage without biases this is the rank of the literature,
`floor(keep * m n / (m + n))`. Rounding down leaves up to one component per target unspent; `fill`
gives it back by largest remainders, so that plans of different rules have equal bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from spectrim.allocate.curve import Curve, loss_by_rank
from spectrim.allocate.ladder import (
    Ladder,
    Limits,
    budget_for,
    ladders_for,
    plan_from_levels,
    spend,
    total_bytes,
)
from spectrim.allocate.plan import Plan

SHARE_STEPS = 60
"""Bisection steps for a common factor; a double has 53 bits."""


def uniform(
    curves: Sequence[Curve], *, keep: float, limits: Limits | None = None, fill: bool = True
) -> Plan:
    """Give every target the same share of its dense bytes.

    Where a least rank takes more than its share, the common share of the others shrinks.

    Args:
        curves: the targets; spectra are not needed, they only add predicted relative errors.
        keep: fraction of the dense target bytes to keep.
        limits: what the plan may contain.
        fill: spend what rounding leaves over; False gives the papers' floor ranks.

    Raises:
        BudgetError: if the keep is below what the limits allow.
    """
    ladders = ladders_for(curves, limits or Limits())
    budget = budget_for(ladders, keep)
    shares = np.full(len(ladders), keep)
    levels = levels_for_shares(ladders, shares, budget)
    if fill:
        levels = spend(ladders, levels, budget, largest_remainders(ladders, levels, shares))
    known = all(c.energy is not None for c in curves)
    losses = [loss_by_rank(c, "energy") for c in curves] if known else None
    return plan_from_levels(ladders, levels, keep=keep, rule="uniform", losses=losses)


def levels_for_shares(
    ladders: Sequence[Ladder], shares: Sequence[float] | np.ndarray, budget: int
) -> np.ndarray:
    """Highest levels within each target's share of its dense bytes, at least the lowest.

    If least ranks push the sum over the budget, all shares shrink by one common factor.
    """
    exact = [Fraction(repr(float(s))) for s in shares]
    levels = _levels_at(ladders, exact, Fraction(1))
    if total_bytes(ladders, levels) <= budget:
        return levels
    low, high = Fraction(0), Fraction(1)
    for _ in range(SHARE_STEPS):
        middle = (low + high) / 2
        if total_bytes(ladders, _levels_at(ladders, exact, middle)) <= budget:
            low = middle
        else:
            high = middle
    return _levels_at(ladders, exact, low)


def largest_remainders(
    ladders: Sequence[Ladder], levels: np.ndarray, shares: Sequence[float] | np.ndarray
) -> list[int]:
    """Targets by how much of their next level their share already pays for, names break ties."""

    def claim(i: int) -> tuple[float, str]:
        ladder, level = ladders[i], int(levels[i])
        if level >= ladder.enough:
            return (0.0, ladder.curve.name)
        step = float(ladder.bytes[level + 1] - ladder.bytes[level])
        unspent = float(shares[i]) * ladder.dense_bytes - float(ladder.bytes[level])
        return (-unspent / step if step > 0 else -np.inf, ladder.curve.name)

    return sorted(range(len(ladders)), key=claim)


def _levels_at(
    ladders: Sequence[Ladder], shares: Sequence[Fraction], factor: Fraction
) -> np.ndarray:
    """Levels for all shares times a factor."""
    return np.array(
        [
            max(0, ladder.level_within(int(share * factor * ladder.dense_bytes)))
            for ladder, share in zip(ladders, shares, strict=True)
        ],
        dtype=np.int64,
    )
