"""One order for every size, reduced to what an elastic artifact stores.

A target whose factors would take as many bytes as the dense weight is stored dense, so that its
components above break-even are never needed: the artifact holds the `h` components removed last,
`h` being the largest rank worth storing, and one entry that stands for "dense" and is removed
before them. Cutting the shortened order gives the same plans as cutting the full one.

Components that must never be removed (folded adapters) come first and count towards the rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from spectrim.allocate.budget import budget_bytes
from spectrim.allocate.curve import Curve, as_numpy
from spectrim.allocate.ladder import Limits, ladders_for
from spectrim.allocate.order import GlobalOrder, global_order, ranks_at
from spectrim.allocate.plan import Plan
from spectrim.errors import BudgetError, InputError

if TYPE_CHECKING:
    from spectrim.allocate.curve import Values


@dataclass(frozen=True, eq=False)
class ElasticOrder:
    """The order of all stored components and the sizes that it offers.

    Attributes:
        curves: the targets, each with `held + 1` entries; the last one stands for dense.
        target: index of the curve of each removal, int32 (N,), first removed first.
        score: what each removal was sorted by, fp32 (N,), non-decreasing.
        adapters: components per target that are never removed.
        least: rank of every target at the smallest size.
        limits: what a plan may contain.
    """

    curves: tuple[Curve, ...]
    target: np.ndarray
    score: np.ndarray
    adapters: tuple[int, ...]
    least: tuple[int, ...]
    limits: Limits

    @property
    def held(self) -> tuple[int, ...]:
        """Components stored per target, adapters included."""
        return tuple(c.rank - 1 for c in self.curves)

    @cached_property
    def dense_bytes(self) -> int:
        """Bytes of all targets if they were dense."""
        return sum(x.dense_bytes for x in ladders_for(self.curves, self.limits))

    @cached_property
    def smallest_bytes(self) -> int:
        """Bytes of all targets at the smallest size."""
        ladders = ladders_for(self.curves, self.limits)
        return sum(
            int(x.bytes[x.levels_by_rank()[k]]) for x, k in zip(ladders, self.least, strict=True)
        )

    @property
    def smallest_keep(self) -> float:
        """Least keep that `plan` answers, rounded up to six digits."""
        return math.ceil(self.smallest_bytes / self.dense_bytes * 1e6) / 1e6

    def plan(self, keep: float, *, repair: bool = False) -> Plan:
        """The plan for a keep: within the budget and within one component of it.

        Args:
            keep: fraction of the dense target bytes.
            repair: spend what is left over, at the price of strict nesting.

        Raises:
            BudgetError: the keep lies below the smallest size, which the message names.
        """
        if budget_bytes(keep, self.dense_bytes) < self.smallest_bytes:
            raise BudgetError(
                f"keep {keep} is below the end of this order: the smallest reachable keep is "
                f"{self.smallest_keep:.6f} ({self.smallest_bytes} of {self.dense_bytes} bytes); "
                "ask for that, or train to a smaller stop_keep"
            )
        order = GlobalOrder(self.target, _positions(self.target, self.curves))
        plan = ranks_at(order, self.curves, keep=keep, limits=self.limits, repair=repair)
        # The curves hold no energies, only counts: they predict nothing.
        return replace(plan, entries=tuple(replace(e, loss=None) for e in plan.entries))


def held_ranks(curves: Sequence[Curve], limits: Limits) -> list[int]:
    """The largest rank of every target that is smaller than its dense weight."""
    return [int(x.ranks[-1]) if x.top else 0 for x in ladders_for(curves, limits)]


def elastic_order(
    curves: Sequence[Curve],
    importance: Sequence[Sequence[Values]],
    *,
    limits: Limits,
    adapters: int = 0,
    least: Sequence[int] | None = None,
    spectral: bool = False,
) -> tuple[ElasticOrder, list[np.ndarray]]:
    """Sort all components and keep what an artifact needs.

    Args:
        curves: the targets; only names and shapes are used.
        importance: per target the keys of its r components, see `global_order`.
        limits: what a plan may contain.
        adapters: components in front of the sorted ones that are never removed.
        least: sorted components per target that survive at the smallest size, default 1.
        spectral: never remove a component before the ones behind it.

    Returns:
        The order, and per target the indices of its stored components, most important first,
        int64 (held - adapters,).

    Raises:
        InputError: the adapters alone cost as much as a dense target.
    """
    bare = [
        Curve(c.name, c.block, c.projection, c.shape, energy=_ones(len(keys[0])))
        for c, keys in zip(curves, importance, strict=True)
    ]
    order = global_order(bare, importance=importance, spectral=spectral)
    full = [Curve(c.name, c.block, c.projection, c.shape) for c in curves]
    held, stays, kept = held_ranks(full, limits), [], []
    places = [np.flatnonzero(order.target == i) for i in range(len(bare))]
    for i, (curve, h) in enumerate(zip(bare, held, strict=True)):
        if adapters >= h:
            raise InputError(
                f"{curve.name}: {adapters} adapter components leave nothing of its {h} stored "
                "ones; lower the adapter rank"
            )
        count = min(h - adapters, curve.rank)
        held[i] = adapters + count
        # One removal more than components: the step from dense to `held`.
        steps = places[i][-(count + 1) :]
        stays.append(steps if steps.size > count else np.append(steps[:1], steps))
        kept.append(order.components(i)[:count].astype(np.int64))
    index = np.sort(np.concatenate(stays))
    ranks = [adapters + max(1 - min(adapters, 1), k) for k in (least or [1] * len(bare))]
    shortened = ElasticOrder(
        curves=tuple(
            Curve(c.name, c.block, c.projection, c.shape, energy=_ones(h + 1))
            for c, h in zip(bare, held, strict=True)
        ),
        target=_with_adapters(order.target[index], adapters, len(bare)),
        score=_scores(order, importance, index, adapters * len(bare)),
        adapters=(adapters,) * len(bare),
        least=tuple(min(h, k) for h, k in zip(held, ranks, strict=True)),
        limits=limits,
    )
    return shortened, kept


def _ones(count: int) -> np.ndarray:
    return np.ones(count)


def _with_adapters(target: np.ndarray, adapters: int, targets: int) -> np.ndarray:
    """Adapters are removed after everything else, which no valid keep reaches."""
    last = np.tile(np.arange(targets, dtype=np.int32), adapters)
    return np.concatenate([target.astype(np.int32), last])


def _scores(
    order: GlobalOrder, importance: Sequence[Sequence[Values]], index: np.ndarray, adapters: int
) -> np.ndarray:
    """The first key along the order; running maximum, as spectral orders wait for their tails."""
    keys = [as_numpy(k[0]) for k in importance]
    offset = np.cumsum([0, *(k.size for k in keys[:-1])])
    along = np.concatenate(keys)[offset[order.target[index]] + order.position[index]]
    scores = np.maximum.accumulate(along) if along.size else along
    return np.concatenate([scores, np.full(adapters, np.inf)]).astype(np.float32)


def _positions(target: np.ndarray, curves: Sequence[Curve]) -> np.ndarray:
    """Stored components are removed from the last to the first."""
    position = np.empty_like(target)
    for i, curve in enumerate(curves):
        position[target == i] = np.arange(curve.rank - 1, -1, -1)
    return position


def bytes_by_components(
    curves: Sequence[Curve], limits: Limits, *, adapters: int = 0
) -> list[np.ndarray]:
    """Stored bytes of every target with 0..r components left besides its adapters, int64 (r + 1,).

    Targets at or above break-even count as dense; rank 0 counts as the least rank.
    """
    tables = []
    for ladder in ladders_for(curves, limits):
        by_rank = ladder.bytes[ladder.levels_by_rank()]
        ranks = np.arange(by_rank.size) + adapters
        sizes = by_rank[np.minimum(ranks, by_rank.size - 1)]
        # A full-rank target never beats the dense one, with adapters on top even less.
        sizes[ranks >= by_rank.size - 1] = ladder.dense_bytes
        tables.append(sizes)
    return tables
