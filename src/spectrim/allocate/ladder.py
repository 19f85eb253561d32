"""Ladders: the sizes that a target may have, and what all rules do with them.

A ladder lists a target's allowed ranks with their bytes, cheapest storage first chosen, and ends
with the dense layer. A rule gives every target a level of its ladder; limits (least rank, rank
multiples, break-even) are built into the ladder and need no further thought.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from spectrim.allocate.budget import Shape, budget_bytes, bytes_by_rank, layer_bytes
from spectrim.allocate.curve import Curve
from spectrim.allocate.forms import EVERY, Form, low_rank_forms, whole_forms
from spectrim.allocate.plan import Plan, PlanEntry, Storage, Weights
from spectrim.errors import BudgetError, InputError


@dataclass(frozen=True)
class Limits:
    """What a plan may contain; the same for every rule.

    Attributes:
        dtype_bytes: of the model's dtype.
        storage: low-rank storage that is allowed; `auto` takes the smaller one at each rank, with
            `dense` and `residual` nothing is cut.
        weights: number formats of the low-rank matrices, or `auto` for all that pay; dense layers
            stay native, but for the knapsack.
        floor: least rank as a share of the break-even rank of factored native storage.
        multiple: ranks are multiples of this.
        formats: patterns of those that `auto` may choose besides native numbers.
        alike: targets that read the same inputs are stored in one form, ranks apart.
    """

    dtype_bytes: int = 2
    storage: Storage = "factored"
    weights: Weights = "native"
    floor: float = 0.0
    multiple: int = 1
    alike: bool = False
    formats: Sequence[str] = EVERY

    def __post_init__(self):
        if not 0 <= self.floor < 1:
            raise InputError(f"floor {self.floor} is outside [0, 1)")
        if self.multiple < 1:
            raise InputError(f"rank multiple {self.multiple} is less than 1")

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms of a cut matrix to choose from."""
        return low_rank_forms(self.storage, self.weights, self.formats)

    @property
    def whole(self) -> tuple[Form, ...]:
        """The forms of a target that is not cut."""
        return whole_forms(self.storage, self.weights, self.formats)

    def of(self, form: Form) -> Limits:
        """The same limits with one form to choose."""
        return replace(self, storage=form.storage, weights=form.weights)


@dataclass(frozen=True, eq=False)
class Ladder:
    """The allowed sizes of one target, ascending.

    Attributes:
        curve: the target.
        ranks: allowed ranks, int64 (levels - 1,); the last level is the dense layer.
        bytes: of every level, int64 (levels,), ascending.
        which: index of each rank's form among those that the limits allow, (levels - 1,).
        limits: what the ladder was built for.
    """

    curve: Curve
    ranks: np.ndarray
    bytes: np.ndarray
    which: np.ndarray
    limits: Limits

    @property
    def top(self) -> int:
        """The level of the dense layer."""
        return self.bytes.size - 1

    @property
    def enough(self) -> int:
        """The lowest level at which nothing of the weight is lost."""
        if self.curve.lossless is None:
            return self.top
        return int(np.searchsorted(self.ranks, self.curve.lossless))

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense layer."""
        return int(self.bytes[-1])

    def form(self, level: int) -> Form:
        """How a target is stored at a level."""
        return Form("dense") if level == self.top else self.limits.forms[int(self.which[level])]

    def level_within(self, budget: int) -> int:
        """Highest level worth having of at most `budget` bytes, -1 if there is none."""
        return min(int(np.searchsorted(self.bytes, budget, side="right")) - 1, self.enough)

    def levels_by_rank(self) -> np.ndarray:
        """For k = 0..r components kept: the lowest level that holds them, int64 (r + 1,)."""
        return np.searchsorted(self.ranks, np.arange(self.curve.rank + 1))


def ladders_for(curves: Sequence[Curve], limits: Limits) -> list[Ladder]:
    """The ladder of every target, in the order of the curves."""
    names = {c.name for c in curves}
    if not curves or len(names) != len(curves):
        raise InputError(f"expected targets with unique names, found {len(curves)} targets")
    return [_ladder(curve, limits) for curve in curves]


def total_bytes(ladders: Sequence[Ladder], levels: np.ndarray) -> int:
    """Bytes of all targets at these levels."""
    return sum(int(ladder.bytes[i]) for ladder, i in zip(ladders, levels, strict=True))


def smallest_keep(curves: Sequence[Curve], limits: Limits) -> float:
    """Least keep that any rule can reach under these limits."""
    ladders = ladders_for(curves, limits)
    lowest = sum(int(x.bytes[0]) for x in ladders)
    if not limits.forms:
        lowest = sum(
            min(
                whole_bytes(x.curve, form, limits.dtype_bytes)
                for form in limits.whole
                if not form.low_rank
            )
            for x in ladders
        )
    return lowest / sum(x.dense_bytes for x in ladders)


def whole_bytes(curve: Curve, form: Form, dtype_bytes: int) -> int:
    """Of a target that is not cut, in one form; of all that the curve stands for."""
    options = {"storage": form.storage, "weights": form.weights, "dtype_bytes": dtype_bytes}
    return curve.copies * layer_bytes(curve.shape, rank=None, **options)


def budget_for(ladders: Sequence[Ladder], keep: float) -> int:
    """Bytes that `keep` allows for all targets.

    Raises:
        BudgetError: if all targets at their lowest level are larger; names the reachable range.
    """
    dense = sum(x.dense_bytes for x in ladders)
    lowest = sum(int(x.bytes[0]) for x in ladders)
    budget = budget_bytes(keep, dense)
    if budget < lowest:
        raise BudgetError(
            f"keep {keep} ({budget} bytes) cannot be reached: with every target at its least rank "
            f"the {len(ladders)} targets take {lowest} of {dense} bytes; reachable are "
            f"{math.ceil(lowest / dense * 1e6) / 1e6:.6f} to 1 "
            f"(a lower floor or rank multiple widens this)"
        )
    return budget


def spend(
    ladders: Sequence[Ladder], levels: np.ndarray, budget: int, order: Sequence[int]
) -> np.ndarray:
    """Raise targets, one level each in turn, until no further level fits the budget.

    Args:
        ladders: of all targets.
        levels: where they stand, int64; not changed.
        budget: bytes for all of them.
        order: targets (indices) in the order of their claims; those left out stay as they are.

    Returns:
        New levels; whatever remains of the budget is less than any single step.
    """
    levels = levels.copy()
    left = budget - total_bytes(ladders, levels)
    waiting = list(order)
    while waiting:
        raised = []
        for i in waiting:
            ladder, level = ladders[i], int(levels[i])
            worth = level < ladder.enough
            step = int(ladder.bytes[level + 1] - ladder.bytes[level]) if worth else -1
            if 0 <= step <= left:
                levels[i] += 1
                left -= step
                raised.append(i)
        waiting = raised
    return levels


def plan_from_levels(
    ladders: Sequence[Ladder],
    levels: np.ndarray,
    *,
    keep: float,
    rule: str,
    losses: Sequence[np.ndarray] | None = None,
    notes: Sequence[str] = (),
) -> Plan:
    """The plan for these levels; `losses` are predicted losses by rank, dense costs nothing.

    No target gets more than what is enough for it.
    """
    entries = []
    for i, (ladder, wanted) in enumerate(zip(ladders, levels, strict=True)):
        level = min(int(wanted), ladder.enough)
        dense = level == ladder.top
        rank = None if dense else int(ladder.ranks[level])
        loss = None if losses is None else float(losses[i][rank]) if rank is not None else 0.0
        entries.append(
            PlanEntry(
                name=ladder.curve.name,
                rank=rank,
                storage=ladder.form(level).storage,
                bytes=int(ladder.bytes[level]),
                dense_bytes=ladder.dense_bytes,
                weights=ladder.form(level).weights,
                loss=loss,
            )
        )
    return Plan(tuple(entries), keep, rule, tuple(notes))


def _ladder(curve: Curve, limits: Limits) -> Ladder:
    """Allowed ranks with their cheapest storage; ranks at or above break-even are left out."""
    if curve.storage is not None:
        limits = replace(limits, storage=curve.storage)
    shape, size = curve.shape, limits.dtype_bytes
    dense = whole_bytes(curve, Form("dense"), size)
    by_storage = np.stack(
        [
            bytes_by_rank(shape, storage=f.storage, weights=f.weights, dtype_bytes=size)
            for f in limits.forms
        ]
        or [np.full(curve.rank + 1, dense)]
    )
    cheapest, which = curve.copies * by_storage.min(axis=0), by_storage.argmin(axis=0)
    published = curve.copies * bytes_by_rank(shape, dtype_bytes=size)
    break_even = int(np.searchsorted(published, dense)) - 1
    lowest = max(1, math.ceil(limits.floor * break_even))
    lowest = -(-lowest // limits.multiple) * limits.multiple
    ranks = np.arange(lowest, curve.rank + 1, limits.multiple, dtype=np.int64)
    ranks = ranks[cheapest[ranks] < dense]
    # A rank is not worth having where a larger one takes no more bytes (padding to groups).
    later = np.append(np.minimum.accumulate(cheapest[ranks][::-1])[::-1][1:], dense)[: ranks.size]
    ranks = ranks[cheapest[ranks] < later]
    return Ladder(
        curve=curve,
        ranks=ranks,
        bytes=np.append(cheapest[ranks], dense),
        which=which[ranks],
        limits=limits,
    )


def largest_rank(shape: Shape, limits: Limits) -> int:
    """Largest rank that a plan can give a target of this shape; at least 1."""
    ladder = ladders_for([Curve("target", 0, "target", shape)], limits)[0]
    return int(ladder.ranks[-1]) if ladder.ranks.size else 1
