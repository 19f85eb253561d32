"""ZS-SVD's selection: drop components so that their predicted loss changes cancel.

Every component i of a target has a signed first-order estimate `dL_i` of what dropping it does to
the loss (arXiv 2602.02848). A target offers its smallest remaining component; of all offers the
one with the least `|dL|` is taken, from those with `dL >= 0` while the running sum is `<= 0` and
from those with `dL < 0` otherwise. While both kinds are on offer, the sum stays within the
largest `|dL|` taken. A drop saves nothing until its target is below break-even, so that savings
telescope to `dense bytes - stored bytes`; the first drop that reaches the wanted saving is the
last.

Differences from the authors' code. A target that ends above break-even goes back to its dense
weight; as it had saved nothing, the budget is still met, but the running sum counts drops that
never happened. As published (`faithful`) that is where it ends. Here the sum is taken without
them and what it lacks is redistributed: components of the targets below break-even are exchanged
at equal bytes (`balance.py`) until the sum of what is really dropped is back at zero, and what the
last drop overshoots goes to the targets that lost components last. No exchange takes a target
above break-even, so none reverts later. Equal keys are ordered by target name and component
instead of by a counter.

The other keys and `ordered=False` are the selection-rule ablation of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spectrim.allocate.balance import Balance
from spectrim.allocate.curve import Curve, curve_values
from spectrim.allocate.ladder import (
    Ladder,
    Limits,
    budget_for,
    ladders_for,
    plan_from_levels,
    spend,
)
from spectrim.allocate.plan import Plan
from spectrim.allocate.removal import (
    Pool,
    by_key,
    by_sign,
    by_two_heaps,
    make_pool,
    occurrences,
)
from spectrim.errors import InputError

Key = Literal["zero_sum", "magnitude", "negative", "sigma"]

STABLE_SIGNS = 0.75
"""Least share of agreeing signs at which they are believed; noise gives a half."""

KEYS: tuple[Key, ...] = ("zero_sum", "magnitude", "negative", "sigma")
"""Selection rules: cancel the sum, smallest |dL|, most negative dL, smallest singular value."""


@dataclass(frozen=True, eq=False)
class Selection:
    """The drops of one run, in order.

    Attributes:
        targets: index of the curve of every drop, int64 (drops,).
        positions: index of the component, int64 (drops,).
        running_sum: predicted loss change after every drop, fp64 (drops,).
        reverted: targets that are dense because their drops saved nothing.
        kept: per target, indices of the components that survive in the end, ascending.
    """

    targets: np.ndarray
    positions: np.ndarray
    running_sum: np.ndarray
    reverted: tuple[int, ...]
    kept: tuple[np.ndarray, ...]


def zero_sum(
    curves: Sequence[Curve],
    *,
    keep: float,
    limits: Limits | None = None,
    faithful: bool = False,
    key: Key = "zero_sum",
    ordered: bool = True,
    sign_stability: float | None = None,
) -> Plan:
    """Rank of every target after the selection; see the module.

    Balancing a sum whose terms have random signs only forces large components out; the least
    `|dL|` first is then the better half of the rule.

    Args:
        curves: the targets with signed `score` (for the key `sigma`: with `energy`).
        keep: fraction of the dense target bytes to keep.
        limits: what the plan may contain.
        faithful: one pass, reverted targets keep their part of the sum, no overshoot given back.
        key: selection rule.
        ordered: drop a target's components from the tail only. Without it the plan has the
            number of survivors and `select` says which they are.
        sign_stability: share of components whose sign is the same on both halves of the
            gradient windows; below `STABLE_SIGNS` signs play no part, unless `faithful`.

    Raises:
        BudgetError: if the keep is below what the limits allow.
        InputError: if a curve lacks the scores.
    """
    ladders = ladders_for(curves, limits or Limits())
    notes = []
    if not faithful and sign_stability is not None and sign_stability < STABLE_SIGNS:
        key = "magnitude"
        notes.append(
            f"signs agree between the halves of the gradient windows for {sign_stability:.0%} of "
            "the components only, so the smallest |dL| goes first whatever its sign"
        )
    selection = _select(ladders, keep, faithful, key, ordered)
    survivors = zip(ladders, selection.kept, strict=True)
    levels = np.array([x.levels_by_rank()[k.size] for x, k in survivors], dtype=np.int64)
    if not faithful and ordered:
        recent = list(dict.fromkeys(selection.targets[::-1].tolist()))
        levels = spend(ladders, levels, budget_for(ladders, keep), recent)
    known = ordered and all(c.score is not None for c in curves)
    losses = [_signed_losses(c) for c in curves] if known else None
    if selection.reverted:
        notes.insert(0, f"{len(selection.reverted)} targets went back to dense")
    return plan_from_levels(ladders, levels, keep=keep, rule="zero_sum", losses=losses, notes=notes)


def select(
    curves: Sequence[Curve],
    *,
    keep: float,
    limits: Limits | None = None,
    faithful: bool = False,
    key: Key = "zero_sum",
    ordered: bool = True,
) -> Selection:
    """Which components are dropped, in order; arguments as for `zero_sum`."""
    return _select(ladders_for(curves, limits or Limits()), keep, faithful, key, ordered)


def _select(
    ladders: Sequence[Ladder], keep: float, faithful: bool, key: Key, ordered: bool
) -> Selection:
    """`select` on ladders."""
    if key not in KEYS:
        raise InputError(f"unknown selection key {key!r}, expected one of {', '.join(KEYS)}")
    curves = [x.curve for x in ladders]
    budget = budget_for(ladders, keep)
    goal = sum(x.dense_bytes for x in ladders) - budget
    changes = [_changes(c, key) for c in curves]
    keys = [_keys(c, change, key) for c, change in zip(curves, changes, strict=True)]
    by_name = sorted(range(len(curves)), key=lambda i: curves[i].name)
    playing = [i for i in by_name if ladders[i].top > 0]
    lowest = [int(ladders[i].ranks[0]) if ordered else 0 for i in playing]
    pool = make_pool(playing, lowest, [changes[i] for i in playing], [keys[i] for i in playing])
    savings = _Savings.of(ladders)
    path = _path(pool, savings, goal, key, ordered)
    targets, positions = pool.target[path], pool.position[path]
    reverted = savings.above_break_even(targets)
    kept = []
    for i, curve in enumerate(curves):
        alive = np.ones(curve.rank, dtype=bool)
        if i not in reverted:
            alive[positions[targets == i]] = False
        kept.append(np.flatnonzero(alive))
    if key == "zero_sum" and ordered and not faithful:
        kept = _balanced(ladders, changes, kept, reverted, budget)
    return Selection(
        targets=targets,
        positions=positions,
        running_sum=np.cumsum(pool.change[path]),
        reverted=tuple(sorted(reverted)),
        kept=tuple(kept),
    )


def _balanced(
    ladders: Sequence[Ladder],
    changes: Sequence[np.ndarray],
    kept: Sequence[np.ndarray],
    reverted: set[int],
    budget: int,
) -> list[np.ndarray]:
    """Survivors after the reverted targets' part of the sum is redistributed."""
    ranks = [k.size for k in kept]
    spent = sum(int(x.bytes[x.levels_by_rank()[k]]) for x, k in zip(ladders, ranks, strict=True))
    by_name = sorted(range(len(ladders)), key=lambda i: ladders[i].curve.name)
    cut = [i for i in by_name if i not in reverted and ranks[i] < ladders[i].curve.rank]
    balance = Balance(
        changes=[changes[i] for i in cut],
        sizes=[ladders[i].bytes[ladders[i].levels_by_rank()] for i in cut],
        ranks=[ranks[i] for i in cut],
        lowest=[int(ladders[i].ranks[0]) for i in cut],
        highest=[int(ladders[i].ranks[-1]) for i in cut],
        total=float(sum(changes[i][ranks[i] :].sum() for i in cut)),
        left=budget - spent,
    )
    balance.run()
    result = list(kept)
    for i, rank in zip(cut, balance.ranks, strict=True):
        result[i] = np.arange(rank)
    return result


@dataclass(frozen=True, eq=False)
class _Savings:
    """Bytes that a target's first, second, ... drop saves, all targets in one array.

    Attributes:
        flat: savings of all targets one after the other.
        offset: where each target starts in `flat`.
        components: of each target.
        most: largest number of drops of each target.
        free: largest number of drops that save nothing at all.
    """

    flat: np.ndarray
    offset: np.ndarray
    components: np.ndarray
    most: np.ndarray
    free: np.ndarray

    @classmethod
    def of(cls, ladders: Sequence[Ladder]) -> _Savings:
        sizes = [x.bytes[x.levels_by_rank()][::-1] for x in ladders]
        flat = np.concatenate(sizes)
        ranks = np.array([x.curve.rank for x in ladders])
        return cls(
            flat=np.append(flat[:-1] - flat[1:], 0),
            offset=np.cumsum([0, *(s.size for s in sizes[:-1])]),
            components=ranks,
            most=np.array([x.curve.rank - int(x.ranks[0]) if x.top else 0 for x in ladders]),
            free=np.array(
                [int((s == x.dense_bytes).sum()) - 1 for s, x in zip(sizes, ladders, strict=True)]
            ),
        )

    def at(self, targets: np.ndarray, count: np.ndarray) -> np.ndarray:
        """Savings of the drop that comes after `count` earlier ones."""
        return self.flat[self.offset[targets] + count]

    def above_break_even(self, dropped: np.ndarray) -> set[int]:
        """Targets that lost components without saving a byte."""
        counts = np.bincount(dropped, minlength=self.free.size)
        return set(np.flatnonzero((counts > 0) & (counts <= self.free)).tolist())


def _path(pool: Pool, savings: _Savings, goal: int, key: Key, ordered: bool) -> np.ndarray:
    """Pool indices of the drops, in order, up to the one that reaches the goal."""
    if key == "zero_sum" and ordered:
        count = savings.components[pool.target] - 1 - pool.position
        return by_two_heaps(pool, savings.at(pool.target, count), goal)
    path = by_sign(pool) if key == "zero_sum" else by_key(pool, ordered=ordered)
    targets = pool.target[path]
    count = occurrences(targets)
    allowed = count < savings.most[targets]
    path, saved = path[allowed], savings.at(targets, count)[allowed]
    return path[: _reach(saved, goal)]


def _reach(saved: np.ndarray, goal: int) -> int:
    """Number of drops until the goal is saved."""
    return int(np.searchsorted(np.cumsum(saved), goal)) + 1 if goal > 0 else 0


def _changes(curve: Curve, key: Key) -> np.ndarray:
    """Signed scores by component; zeros where the key does not need them and none are known."""
    if curve.score is None and key == "sigma":
        return np.zeros(curve.rank)
    return curve_values(curve, "score")


def _keys(curve: Curve, changes: np.ndarray, key: Key) -> np.ndarray:
    """What the components are sorted by, least first."""
    if key == "negative":
        return changes
    if key != "sigma":
        return np.abs(changes)
    return curve_values(curve, "energy")


def _signed_losses(curve: Curve) -> np.ndarray:
    """Sum of the scores of what is dropped at rank 0..r."""
    changes = _changes(curve, "zero_sum")
    return np.append(np.cumsum(changes[::-1])[::-1], 0.0)
