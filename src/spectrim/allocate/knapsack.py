"""Least predicted loss under the byte budget: a multiple-choice knapsack.

Every target is stored in exactly one way: dense, or at an allowed rank, in an allowed form (storage
and number formats). With `loss_t(p)` and `bytes_t(p)` of the ways p of target t, the plan minimises
`sum_t loss_t(p_t)` subject to `sum_t bytes_t(p_t) <= budget`. For a price `lam` per byte the
targets decouple (each takes the least `loss + lam * bytes`), which bounds the optimum from below
and gives a plan on the lower convex hulls; `choice.py` finds the price and spends what remains,
exactly where the number of near-optimal combinations allows.

The same problem is posed by LEMS (OpenReview IjIgNPFuCt), who solve it as an integer program;
their error model is the score `measured`. Differences: no depth bias, all ranks are candidates.

What a form rounds away is added to what the cut costs: the curve's own numbers for this form
(`Curve.rounding`), or the share of the whole that the format loses on Gaussian numbers. Predictions
of cutting and of rounding are not on one scale; `scale` says what each is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from spectrim.allocate.budget import budget_bytes, bytes_by_rank
from spectrim.allocate.choice import choose
from spectrim.allocate.curve import Curve, Score, as_numpy, loss_by_rank
from spectrim.allocate.forms import Form
from spectrim.allocate.ladder import Ladder, Limits, ladders_for, whole_bytes
from spectrim.allocate.plan import Plan, PlanEntry
from spectrim.allocate.ways import Ways, joined, together, undominated
from spectrim.errors import BudgetError, InputError

CUTTING, ROUNDING = "cutting", "rounding"
"""What a predicted loss can come from."""


def knapsack(
    curves: Sequence[Curve],
    *,
    keep: float,
    limits: Limits | None = None,
    score: Score = "energy",
    forms: Sequence[Form] | None = None,
    scale: Mapping[str, float] | None = None,
    states: int = 1024,
) -> Plan:
    """Choose rank, storage and number formats of every target for the least predicted loss.

    Args:
        curves: the targets with what the score needs.
        keep: fraction of the dense native target bytes to keep.
        limits: what the plan may contain.
        score: how losses are predicted; they are added over targets, so scores in loss units
            are comparable and relative energies are not strictly.
        forms: cut and dense, to choose from; by default those of the limits.
        scale: what a predicted nat of `cutting` and of `rounding` is worth, 1 by default.
        states: near-optimal combinations kept in the exact step; with more of them than this
            the plan is near-optimal instead of optimal, and its notes say by how much at most.

    Raises:
        BudgetError: if the keep is below what the choices allow.
        InputError: if a curve lacks what the score needs.
    """
    limits = limits or Limits()
    if forms is None:
        forms = (*limits.forms, *limits.whole)
    if not forms:
        raise InputError("forms is empty: expected at least one form to choose from")
    cut = {i: ladders_for(curves, limits.of(f)) for i, f in enumerate(forms) if not f.whole}
    parts = [
        _parts(
            curve,
            forms,
            {i: ladders[place] for i, ladders in cut.items()},
            loss_by_rank(curve, score),
            scale or {},
            limits,
        )
        for place, curve in enumerate(curves)
    ]
    # Canonical order: the result must not depend on the order of the targets.
    units = joined(curves, alike=limits.alike)
    units.sort(key=lambda members: curves[members[0]].name)
    ways = [_ways([parts[i] for i in members]) for members in units]
    dense = [whole_bytes(curve, Form("dense"), limits.dtype_bytes) for curve in curves]
    budget = _budget(ways, keep, len(curves), sum(dense))
    chosen = choose([w.bytes for w in ways], [w.loss for w in ways], budget, states=states)
    picks, entries, total = chosen.picks.tolist(), {}, 0.0
    for members, one, pick in zip(units, ways, picks, strict=True):
        total += float(one.loss[pick])
        for column, i in enumerate(members):
            entries[i] = _entry(curves[i], forms, one, (pick, column), dense[i])
    notes = () if chosen.exact else (f"at most {total - chosen.bound:.3g} above the least loss",)
    return Plan(tuple(entries[i] for i in range(len(curves))), keep, "knapsack", notes)


def _parts(
    curve: Curve,
    forms: Sequence[Form],
    ladders: Mapping[int, Ladder],
    losses: np.ndarray,
    scale: Mapping[str, float],
    limits: Limits,
) -> list[Ways]:
    """The ways of one target in each form."""
    parts = []
    whole = float(losses[0])
    for i, form in enumerate(forms):
        added = scale.get(ROUNDING, 1.0) * _rounding(curve, form, whole)
        if not form.whole:
            ranks = ladders[i].ranks
            loss = scale.get(CUTTING, 1.0) * losses[ranks] + added[ranks % added.size]
            parts.append(Ways.of_one(i, ranks, ladders[i].bytes[:-1], loss))
        elif form.low_rank:
            offered = form.ranks(curve.rank)
            ranks = np.array([k for k in offered if k % limits.multiple == 0], dtype=np.int64)
            options = {"storage": form.storage, "weights": form.weights}
            by_rank = bytes_by_rank(curve.shape, **options, dtype_bytes=limits.dtype_bytes)
            stored = curve.copies * by_rank[ranks]
            parts.append(Ways.of_one(i, ranks, stored, added[ranks % added.size]))
        else:
            stored = np.array([whole_bytes(curve, form, limits.dtype_bytes)])
            parts.append(Ways.of_one(i, np.array([0]), stored, added))
    return parts


def _ways(members: Sequence[Sequence[Ways]]) -> Ways:
    """The ways of a unit: of its only target, or of all its targets in one form."""
    if len(members) == 1:
        return undominated(members[0])
    alike = zip(*members, strict=True)
    return undominated(
        [together([undominated([one]) for one in row]) for row in alike if all(map(_any, row))]
    )


def _any(ways: Ways) -> bool:
    """Whether a target can be stored in a form at all."""
    return ways.form.size > 0


def _rounding(curve: Curve, form: Form, whole: float) -> np.ndarray:
    """Loss that rounding adds, by rank or one number: measured, or a share of the whole."""
    known = None if curve.rounding is None else curve.rounding.get(form.key)
    return np.array([form.rounding_share * whole]) if known is None else as_numpy(known)


def _budget(ways: Sequence[Ways], keep: float, targets: int, dense: int) -> int:
    """Bytes for all targets; the reachable range is that of the ways, not of one ladder."""
    lowest = sum(int(w.bytes[0]) for w in ways)
    budget = budget_bytes(keep, dense)
    if budget < lowest:
        raise BudgetError(
            f"keep {keep} ({budget} bytes) cannot be reached: the {targets} targets take at "
            f"least {lowest} of {dense} bytes; reachable are {lowest / dense:.6f} to 1"
        )
    return budget


def _entry(
    curve: Curve, forms: Sequence[Form], ways: Ways, at: tuple[int, int], dense_bytes: int
) -> PlanEntry:
    """The plan entry of one target of a unit: `at` is the chosen way, and the target's column."""
    form = forms[int(ways.form[at[0]])]
    return PlanEntry(
        name=curve.name,
        rank=int(ways.rank[at]) if form.low_rank else None,
        storage=form.storage,
        bytes=int(ways.sizes[at]),
        dense_bytes=dense_bytes,
        weights=form.weights,
        loss=float(ways.losses[at]),
    )
