"""Least predicted loss under the byte budget: a multiple-choice knapsack.

Every target is stored in exactly one way: dense, or at an allowed rank in an allowed storage and
number format. With `loss_t(p)` and `bytes_t(p)` of the ways p of target t, the plan minimises
`sum_t loss_t(p_t)` subject to `sum_t bytes_t(p_t) <= budget`. For a price `lam` per byte the
targets decouple (each takes the least `loss + lam * bytes`), which bounds the optimum from below
and gives a plan on the lower convex hulls; `choice.py` finds the price and spends what remains,
exactly where the number of near-optimal combinations allows.

The same problem is posed by LEMS (OpenReview IjIgNPFuCt), who solve it as an integer program;
their error model is the score `measured`. Differences: no depth bias, all ranks are candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from spectrim.allocate.budget import budget_bytes, layer_bytes
from spectrim.allocate.choice import choose
from spectrim.allocate.curve import Curve, Score, loss_by_rank
from spectrim.allocate.ladder import Ladder, Limits, ladders_for
from spectrim.allocate.plan import Plan, PlanEntry, Storage, Weights
from spectrim.errors import BudgetError, InputError
from spectrim.formats import JOINT, format_of

__all__ = ["knapsack", "rounding_share"]


@dataclass(frozen=True, eq=False)
class _Ways:
    """The ways to store one target that no other way beats in bytes and loss, by bytes."""

    bytes: np.ndarray
    loss: np.ndarray
    ladder: np.ndarray
    level: np.ndarray


def knapsack(
    curves: Sequence[Curve],
    *,
    keep: float,
    limits: Limits | None = None,
    score: Score = "energy",
    weights: Sequence[Weights] | None = None,
    dense_weights: Sequence[Weights] = ("native",),
    states: int = 1024,
) -> Plan:
    """Choose rank, storage and number format of every target for the least predicted loss.

    Args:
        curves: the targets with what the score needs.
        keep: fraction of the dense native target bytes to keep.
        limits: what the plan may contain.
        score: how losses are predicted; they are added over targets, so scores in loss units
            are comparable and relative energies are not strictly.
        weights: number formats of low-rank matrices to choose from, default that of the limits.
        dense_weights: number formats of dense targets to choose from.
        states: near-optimal combinations kept in the exact step; with more of them than this
            the plan is near-optimal instead of optimal, and its notes say by how much at most.

    Raises:
        BudgetError: if the keep is below what the choices allow.
        InputError: if a curve lacks what the score needs.
    """
    limits = limits or Limits()
    formats = tuple(weights or (limits.weights,))
    if not dense_weights:
        raise InputError("dense_weights is empty: expected at least one number format")
    by_format = [ladders_for(curves, replace(limits, weights=w)) for w in formats]
    ways = [
        _ways(list(ladders), loss_by_rank(curve, score), tuple(dense_weights))
        for curve, ladders in zip(curves, zip(*by_format, strict=True), strict=True)
    ]
    budget = _budget(by_format[0], ways, keep)
    # Canonical order: the result must not depend on the order of the targets.
    by_name = sorted(range(len(curves)), key=lambda i: curves[i].name)
    chosen = choose(
        [ways[i].bytes for i in by_name], [ways[i].loss for i in by_name], budget, states=states
    )
    place = dict(zip(by_name, chosen.picks.tolist(), strict=True))
    entries = tuple(
        _entry([ladders[i] for ladders in by_format], ways[i], place[i], tuple(dense_weights))
        for i in range(len(curves))
    )
    total = sum(float(ways[i].loss[place[i]]) for i in range(len(curves)))
    notes = () if chosen.exact else (f"at most {total - chosen.bound:.3g} above the least loss",)
    return Plan(entries, keep, "knapsack", notes)


def rounding_share(weights: Weights) -> float:
    """Loss of rounding to nearest, as a share of losing the whole target."""
    return max(format_of(name).rounding_share for name in weights.split(JOINT))


def _ways(ladders: Sequence[Ladder], losses: np.ndarray, dense_weights: Sequence[Weights]) -> _Ways:
    """All ways of one target, less the dominated ones."""
    parts = []
    for i, ladder in enumerate(ladders):
        rounding = rounding_share(ladder.limits.weights) * float(losses[0])
        levels = np.arange(ladder.top)
        parts.append(
            (ladder.bytes[:-1], losses[ladder.ranks] + rounding, np.full(ladder.top, i), levels)
        )
    curve, size = ladders[0].curve, ladders[0].limits.dtype_bytes
    for i, weights in enumerate(dense_weights):
        stored = curve.copies * layer_bytes(
            curve.shape, rank=None, storage="dense", weights=weights, dtype_bytes=size
        )
        loss = rounding_share(weights) * float(losses[0])
        parts.append((np.array([stored]), np.array([loss]), np.array([-1]), np.array([i])))
    stored, loss, ladder, level = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.lexsort((loss, stored))
    loss = loss[order]
    best_before = np.append(np.inf, np.minimum.accumulate(loss)[:-1])
    order, loss = order[loss < best_before], loss[loss < best_before]
    return _Ways(stored[order], loss, ladder[order], level[order])


def _budget(ladders: Sequence[Ladder], ways: Sequence[_Ways], keep: float) -> int:
    """Bytes for all targets; the reachable range is that of the ways, not of one ladder."""
    lowest = sum(int(w.bytes[0]) for w in ways)
    dense = sum(x.dense_bytes for x in ladders)
    budget = budget_bytes(keep, dense)
    if budget < lowest:
        raise BudgetError(
            f"keep {keep} ({budget} bytes) cannot be reached: the {len(ways)} targets take at "
            f"least {lowest} of {dense} bytes; reachable are {lowest / dense:.6f} to 1"
        )
    return budget


def _entry(
    ladders: Sequence[Ladder], ways: _Ways, pick: int, dense_weights: Sequence[Weights]
) -> PlanEntry:
    """The plan entry of one target's chosen way."""
    first, level = ladders[0], int(ways.level[pick])
    which = int(ways.ladder[pick])
    rank: int | None = None
    storage: Storage = "dense"
    weights = dense_weights[level] if which < 0 else ladders[which].limits.weights
    if which >= 0:
        rank, storage = int(ladders[which].ranks[level]), ladders[which].storage(level)
    return PlanEntry(
        name=first.curve.name,
        rank=rank,
        storage=storage,
        bytes=int(ways.bytes[pick]),
        dense_bytes=first.dense_bytes,
        weights=weights,
        loss=float(ways.loss[pick]),
    )
