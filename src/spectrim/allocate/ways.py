"""The ways to store a target, or some targets in one form, for a knapsack to choose from.

Engines fuse targets that read the same inputs (queries, keys and values; gate and up) if all of
them are stored alike. Such targets are chosen for together: in each form, from the least of every
target on, whatever gains most per byte is taken next, which passes all points of the lower hull of
their sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from spectrim.allocate.curve import Curve


@dataclass(frozen=True, eq=False)
class Ways:
    """Ways to store the targets of a unit, most often one target.

    Attributes:
        form: index of every way's form, (ways,).
        rank: of every target, 0 where it is not cut, (ways, targets).
        sizes: bytes, int64 (ways, targets).
        losses: predicted, (ways, targets).
    """

    form: np.ndarray
    rank: np.ndarray
    sizes: np.ndarray
    losses: np.ndarray

    @classmethod
    def of_one(cls, form: int, rank: np.ndarray, sizes: np.ndarray, losses: np.ndarray) -> Ways:
        """Of one target in one form."""
        return cls(np.full(rank.size, form), rank[:, None], sizes[:, None], losses[:, None])

    @cached_property
    def bytes(self) -> np.ndarray:
        """Of every way, int64 (ways,)."""
        return self.sizes.sum(axis=1)

    @cached_property
    def loss(self) -> np.ndarray:
        """Of every way, (ways,)."""
        return self.losses.sum(axis=1)

    def at(self, places: np.ndarray) -> Ways:
        """Some of the ways."""
        arrays = (self.form, self.rank, self.sizes, self.losses)
        return Ways(*(array[places] for array in arrays))


def undominated(parts: Sequence[Ways]) -> Ways:
    """All ways of the parts, by bytes, but for those that another beats in bytes and loss."""
    form, rank, sizes, losses = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("form", "rank", "sizes", "losses")
    )
    every = Ways(form, rank, sizes, losses)
    order = np.lexsort((every.loss, every.bytes))
    loss = every.loss[order]
    best_before = np.append(np.inf, np.minimum.accumulate(loss)[:-1])
    return every.at(order[loss < best_before])


def together(members: Sequence[Ways]) -> Ways:
    """Ways of several targets in one form, from those of each: the lower hull of their sums."""
    hulls = [one.at(_hull(one.bytes, one.loss)) for one in members]
    steps = []
    for i, hull in enumerate(hulls):
        # Falling along a hull, but for rounding.
        gains = np.minimum.accumulate(-np.diff(hull.loss) / np.diff(hull.bytes))
        steps += [(-gain, i, place + 1) for place, gain in enumerate(gains)]
    places = np.zeros((len(steps) + 1, len(hulls)), dtype=np.int64)
    for row, (_, i, place) in enumerate(sorted(steps), 1):
        places[row:, i] = place
    parts = [hull.at(places[:, i]) for i, hull in enumerate(hulls)]
    columns = [
        np.concatenate([getattr(part, name) for part in parts], axis=1)
        for name in ("rank", "sizes", "losses")
    ]
    return Ways(parts[0].form, *columns)


def _hull(sizes: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Places of the points on the lower convex hull of ascending sizes and falling losses."""
    kept: list[int] = []
    for new in range(sizes.size):
        while len(kept) > 1:
            first, last = kept[-2], kept[-1]
            before = (losses[first] - losses[last]) * (sizes[new] - sizes[last])
            after = (losses[last] - losses[new]) * (sizes[last] - sizes[first])
            if before > after:
                break
            kept.pop()
        kept.append(new)
    return np.array(kept)


def joined(curves: Sequence[Curve], *, alike: bool) -> list[list[int]]:
    """Indices of the curves that are chosen for together: one each, or those of one group."""
    found: dict[object, list[int]] = {}
    for i, curve in enumerate(curves):
        shared = alike and curve.group is not None
        found.setdefault((curve.block, curve.group) if shared else i, []).append(i)
    return list(found.values())
