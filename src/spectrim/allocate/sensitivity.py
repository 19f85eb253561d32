"""ASVD's truncation rank search over a table of measured sensitivities (arXiv 2312.05821).

The table holds, for every target and a few candidate keeps, the perplexity (or a predicted loss)
with only this target cut. All its entries are sorted, worst first, and a cut of that list is
sought by bisection: entries behind the cut are allowed, every target takes its smallest allowed
candidate and stays dense if it has none. The last cut within the budget is applied.

Difference from the authors' code: theirs applies the last cut that bisection happened to look at,
which can be one step off; here it is the largest feasible one. Measuring the table costs one
evaluation per entry and is done elsewhere; this is a pure function of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from spectrim.allocate.budget import budget_bytes
from spectrim.allocate.curve import Curve, Score, loss_by_rank
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
from spectrim.errors import BudgetError, InputError, NonFiniteError

TABLE = "table"
"""Stands beside the scores for ASVD's measured sensitivities."""

CANDIDATES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""The keeps that ASVD tries for every target."""

Table = Mapping[tuple[str, float], float]
"""(target name, keep) -> perplexity or loss with only this target cut to this keep."""


def predicted_table(
    curves: Sequence[Curve],
    *,
    score: Score = "energy",
    limits: Limits | None = None,
    candidates: Sequence[float] = CANDIDATES,
) -> dict[tuple[str, float], float]:
    """A table without any evaluation: the loss that a score predicts for every candidate."""
    table = {}
    for ladder in ladders_for(curves, limits or Limits()):
        losses = loss_by_rank(ladder.curve, score)
        for keep in candidates:
            level = ladder.level_within(budget_bytes(keep, ladder.dense_bytes))
            if 0 <= level < ladder.top:
                table[ladder.curve.name, keep] = float(losses[ladder.ranks[level]])
    return table


def sensitivity(
    curves: Sequence[Curve],
    *,
    keep: float,
    table: Table | None = None,
    score: Score = "energy",
    limits: Limits | None = None,
    fill: bool = True,
) -> Plan:
    """Cut the least sensitive (target, candidate) pairs until the budget is met.

    Args:
        curves: the targets; spectra are not needed.
        keep: fraction of the dense target bytes to keep.
        table: sensitivity of every target at every candidate; candidates below a target's
            least rank count as that rank.
        score: predicts the table where there is none; `measured` predicts nothing.
        limits: what the plan may contain.
        fill: spend what the coarse candidates leave over, most sensitive targets first; False
            is the published rule.

    Raises:
        BudgetError: if all targets at their smallest candidate are still over the budget.
        InputError: if the table names an unknown target, has no entry for any, or is missing
            where it was to be measured.
        NonFiniteError: if a sensitivity is NaN (infinite ones are the most sensitive).
    """
    ladders = ladders_for(curves, limits or Limits())
    budget = budget_for(ladders, keep)
    if score != "measured" and table is None:
        table = predicted_table(curves, score=score, limits=limits)
    if table is None:
        raise InputError(
            "the survey holds no measured sensitivities; survey with the recipe asvd, or predict "
            "them from spectra with score energy"
        )
    targets, levels, losses = _sorted_entries(ladders, table)
    start = np.array([x.top for x in ladders], dtype=np.int64)

    def chosen(cut: int) -> np.ndarray:
        result = start.copy()
        np.minimum.at(result, targets[cut:], levels[cut:])
        return result

    smallest = total_bytes(ladders, chosen(0))
    if smallest > budget:
        dense = sum(x.dense_bytes for x in ladders)
        raise BudgetError(
            f"keep {keep} ({budget} bytes) cannot be reached with these candidates: the smallest "
            f"take {smallest} of {dense} bytes; reachable are {smallest / dense:.6f} to 1 "
            f"(add smaller candidates to the table)"
        )
    most, evaluations = _most(len(targets), lambda cut: total_bytes(ladders, chosen(cut)) <= budget)
    result = chosen(most)
    if fill:
        result = spend(ladders, result, budget, _claims(ladders, result, targets, levels, losses))
    notes = (f"{len(table)} sensitivities, {evaluations} sizes evaluated",)
    return plan_from_levels(ladders, result, keep=keep, rule="sensitivity", notes=notes)


def _most(count: int, fits: Callable[[int], bool]) -> tuple[int, int]:
    """The largest number up to `count` that fits, where 0 does, and how many were looked at."""
    low, high, looked_at = 0, count, 1
    while low < high:
        middle = (low + high + 1) // 2
        looked_at += 1
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low, looked_at


def _sorted_entries(
    ladders: Sequence[Ladder], table: Table
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Target index, level and sensitivity of every entry, most sensitive first."""
    index = {x.curve.name: i for i, x in enumerate(ladders)}
    if not table:
        raise InputError("the sensitivity table is empty: expected one entry per target and keep")
    for name, keep in table:
        if name not in index:
            raise InputError(f"the sensitivity table names {name!r}, which is no target")
        if math.isnan(table[name, keep]):
            raise NonFiniteError(f"the sensitivity of {name} at keep {keep} is NaN")
    entries = sorted(table.items(), key=lambda e: (-e[1], e[0]))
    targets = np.array([index[name] for (name, _), _ in entries], dtype=np.int64)
    levels = np.array(
        [
            max(0, ladders[i].level_within(budget_bytes(keep, ladders[i].dense_bytes)))
            for i, ((_, keep), _) in zip(targets, entries, strict=True)
        ],
        dtype=np.int64,
    )
    return targets, levels, np.array([loss for _, loss in entries])


def _claims(
    ladders: Sequence[Ladder],
    result: np.ndarray,
    targets: np.ndarray,
    levels: np.ndarray,
    losses: np.ndarray,
) -> list[int]:
    """Cut targets by the sensitivity of what they lost, most sensitive first."""
    taken = np.full(len(ladders), -np.inf)
    hit = levels == result[targets]
    np.maximum.at(taken, targets[hit], losses[hit])
    names = [x.curve.name for x in ladders]
    return sorted(range(len(ladders)), key=lambda i: (-taken[i], names[i]))


def candidate_ranks(curve: Curve, limits: Limits) -> dict[float, int]:
    """ASVD's candidate keeps of one target with the ranks that they allow."""
    ladder = ladders_for([curve], limits)[0]
    levels = {
        keep: ladder.level_within(budget_bytes(keep, ladder.dense_bytes)) for keep in CANDIDATES
    }
    return {keep: int(ladder.ranks[i]) for keep, i in levels.items() if 0 <= i < ladder.top}
