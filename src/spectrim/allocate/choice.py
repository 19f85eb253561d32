"""The multiple-choice knapsack itself, on plain arrays: one point per target, least total loss.

1. The price: `bound(lam) = sum_t min_p(loss + lam * bytes) - lam * budget` is a lower bound of
   the optimum for every `lam >= 0`. Its maximum is found between an affordable and an
   unaffordable choice, by trying the price at which both are equally good until no choice lies
   between them; a step costs one pass over all points.
2. Repair: from the affordable choice, the improvement with the best loss per byte is taken as
   long as one fits; points off the convex hull count too.
3. Exact step: a point whose reduced cost `loss + lam * bytes - min` exceeds the distance between
   repaired plan and bound is in no better plan. The few that remain are combined target by
   target, keeping undominated (bytes, loss) pairs within that distance. If they outnumber
   `states`, or a target has too many points to try them all, the least reduced costs stay, and
   the result is near-optimal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

WORK = 16
"""Combinations tried per target, as a multiple of those held."""

FEWEST_POINTS = 8
"""Points that a target keeps in the exact step, however many combinations there are."""

ROUNDOFF = 64 * float(np.finfo(np.float64).eps)
"""Relative slack of comparisons between sums of losses."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The picked point of every target.

    Attributes:
        picks: index of the point, int64 (T,).
        bound: no choice within the budget has a smaller total loss.
        exact: whether the picks are optimal.
    """

    picks: np.ndarray
    bound: float
    exact: bool


def choose(
    sizes: Sequence[np.ndarray], losses: Sequence[np.ndarray], budget: int, *, states: int
) -> Choice:
    """Pick one point per target with the least total loss within the budget.

    Args:
        sizes: bytes of every target's points, int64, strictly ascending.
        losses: their losses, fp64, strictly descending.
        budget: bytes for all targets, at least the sum of all first points.
        states: largest number of combinations that the exact step holds.
    """
    lightest, best = _first(sizes), _last(sizes)
    if _total(sizes, best) <= budget:
        return Choice(best, float(_loss(losses, best)), exact=True)
    table = _Table.of(sizes, losses)
    light, price = _price(table, lightest, best, budget)
    bound = float(table.least(price).sum()) - price * budget
    picks = _repair(sizes, losses, light, budget)
    gap = _loss(losses, picks) - bound
    slack = ROUNDOFF * max(abs(bound), _loss(losses, lightest))
    if gap <= slack:
        return Choice(picks, bound, exact=True)
    improved, exact = _combine(sizes, losses, table, price, budget, gap + slack, states)
    if improved is not None and _loss(losses, improved) < _loss(losses, picks):
        picks = improved if exact else _repair(sizes, losses, improved, budget)
    return Choice(picks, bound, exact)


@dataclass(frozen=True, eq=False)
class _Table:
    """All points in one (T, P) table, padded with points that nobody picks."""

    size: np.ndarray
    loss: np.ndarray

    @classmethod
    def of(cls, sizes: Sequence[np.ndarray], losses: Sequence[np.ndarray]) -> _Table:
        width = max(s.size for s in sizes)
        size = np.zeros((len(sizes), width))
        loss = np.full((len(sizes), width), np.inf)
        for i, (s, x) in enumerate(zip(sizes, losses, strict=True)):
            size[i, : s.size] = s
            loss[i, : x.size] = x
        return cls(size, loss)

    def picks(self, price: float) -> np.ndarray:
        """Every target's best point at a price."""
        return np.argmin(self.loss + price * self.size, axis=1)

    def least(self, price: float) -> np.ndarray:
        """Every target's least `loss + price * bytes`."""
        return np.min(self.loss + price * self.size, axis=1)

    def totals(self, picks: np.ndarray) -> tuple[float, float]:
        """Bytes and loss of a choice."""
        rows = np.arange(picks.size)
        return float(self.size[rows, picks].sum()), float(self.loss[rows, picks].sum())


def _price(
    table: _Table, light: np.ndarray, heavy: np.ndarray, budget: int
) -> tuple[np.ndarray, float]:
    """The affordable choice next to the budget on the convex hull, and the price there."""
    (light_size, light_loss), (heavy_size, heavy_loss) = table.totals(light), table.totals(heavy)
    while True:
        price = (light_loss - heavy_loss) / (heavy_size - light_size)
        picks = table.picks(price)
        size, loss = table.totals(picks)
        if size in (light_size, heavy_size) or not light_size < size < heavy_size:
            return light, price
        if size <= budget:
            light, light_size, light_loss = picks, size, loss
        else:
            heavy_size, heavy_loss = size, loss


def _repair(
    sizes: Sequence[np.ndarray], losses: Sequence[np.ndarray], picks: np.ndarray, budget: int
) -> np.ndarray:
    """Take the improvement with the most loss per byte until none fits."""
    picks = picks.copy()
    left = budget - _total(sizes, picks)

    def offer(i: int) -> tuple[float, int, int] | None:
        at = int(picks[i])
        size, loss = sizes[i], losses[i]
        end = int(np.searchsorted(size, size[at] + left, side="right"))
        if end <= at + 1:
            return None
        gain = (loss[at] - loss[at + 1 : end]) / (size[at + 1 : end] - size[at])
        best = int(np.argmax(gain))
        return -float(gain[best]), i, at + 1 + best

    offers = [o for o in map(offer, range(picks.size)) if o is not None]
    heapify(offers)
    while offers:
        _, i, to = heappop(offers)
        step = int(sizes[i][to] - sizes[i][picks[i]])
        if step <= left:
            left -= step
            picks[i] = to
        # Either it has moved, or its offer has become too large: it may have another one.
        if (again := offer(i)) is not None:
            heappush(offers, again)
    return picks


def _combine(
    sizes: Sequence[np.ndarray],
    losses: Sequence[np.ndarray],
    table: _Table,
    price: float,
    budget: int,
    gap: float,
    states: int,
) -> tuple[np.ndarray | None, bool]:
    """The best combination of points with small reduced costs, and whether all were tried."""
    least = table.least(price)
    total = len(sizes)
    points, reduced = [], []
    for i in range(total):
        cost = losses[i] + price * sizes[i] - least[i]
        stays = np.flatnonzero(cost <= gap)
        points.append(stays)
        reduced.append(cost[stays])
    # Targets with few points first: the lists of combinations stay short for longest.
    order = sorted(range(total), key=lambda i: (points[i].size, i))
    rest = np.cumsum([0, *(int(sizes[i][points[i][0]]) for i in reversed(order))])[::-1]
    size = np.zeros(1, dtype=np.int64)
    cost, loss = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    exact = True
    for depth, i in enumerate(order):
        most = max(FEWEST_POINTS, WORK * states // size.size)
        if points[i].size > most:
            exact = False
            nearest = np.sort(np.argsort(reduced[i], kind="stable")[:most])
            points[i], reduced[i] = points[i][nearest], reduced[i][nearest]
        new_size = (size[:, None] + sizes[i][points[i]]).ravel()
        new_cost = (cost[:, None] + reduced[i]).ravel()
        new_loss = (loss[:, None] + losses[i][points[i]]).ravel()
        fits = np.flatnonzero((new_cost <= gap) & (new_size + rest[depth + 1] <= budget))
        by_size = fits[np.lexsort((new_loss[fits], new_size[fits]))]
        before = np.append(np.inf, np.minimum.accumulate(new_loss[by_size])[:-1])
        front = by_size[new_loss[by_size] < before]
        if front.size > states:
            exact = False
            front = np.sort(front[np.argsort(new_cost[front], kind="stable")[:states]])
        if front.size == 0:
            return None, exact
        steps.append((front // points[i].size, points[i][front % points[i].size]))
        size, cost, loss = new_size[front], new_cost[front], new_loss[front]
    state = int(np.argmin(loss))
    picks = np.empty(total, dtype=np.int64)
    for i, (parents, taken) in zip(reversed(order), reversed(steps), strict=True):
        picks[i] = taken[state]
        state = int(parents[state])
    return picks, exact


def _first(sizes: Sequence[np.ndarray]) -> np.ndarray:
    return np.zeros(len(sizes), dtype=np.int64)


def _last(sizes: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([s.size - 1 for s in sizes], dtype=np.int64)


def _total(sizes: Sequence[np.ndarray], picks: np.ndarray) -> int:
    return sum(int(s[p]) for s, p in zip(sizes, picks, strict=True))


def _loss(losses: Sequence[np.ndarray], picks: np.ndarray) -> float:
    return float(sum(float(x[p]) for x, p in zip(losses, picks, strict=True)))
