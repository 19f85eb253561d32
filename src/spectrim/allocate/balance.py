"""Bring a predicted loss change back to zero at equal bytes, by exchanging components.

Dropping a component with `dL < 0`, or taking back one with `dL > 0`, lowers the sum; the first
saves bytes and the second costs them, so that many such exchanges fit into a budget that is
already spent. Spectral order is kept: only a target's last component can go, and only the one
dropped last can come back.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

import numpy as np

Offer = tuple[float, int, int]


class Balance:
    """Ranks of some targets, a sum of loss changes, and the bytes left over.

    Args:
        changes: signed loss change of dropping each component, per target, head first.
        sizes: bytes at rank 0..r, per target.
        ranks: components kept, per target.
        lowest: least ranks.
        highest: largest ranks.
        total: sum of the changes of what is dropped.
        left: bytes that may still be spent.
    """

    def __init__(
        self,
        *,
        changes: Sequence[np.ndarray],
        sizes: Sequence[np.ndarray],
        ranks: Sequence[int],
        lowest: Sequence[int],
        highest: Sequence[int],
        total: float,
        left: int,
    ):
        self.changes, self.sizes = changes, sizes
        self.ranks, self.lowest, self.highest = list(ranks), lowest, highest
        self.total, self.left = total, left

    def run(self) -> None:
        """Exchange until the sum has crossed zero, or no exchange brings it closer."""
        sign = 1.0 if self.total > 0 else -1.0
        targets = range(len(self.ranks))
        back = [o for t in targets if (o := self._return_offer(t, sign)) is not None]
        out = [o for t in targets if (o := self._drop_offer(t, sign)) is not None]
        heapify(back)
        heapify(out)
        while sign * self.total > 0:
            self._discard(back)
            self._discard(out)
            if back and self._cost(back[0]) <= self.left:
                _, target, rank = heappop(back)
                self.left -= int(self.sizes[target][rank + 1] - self.sizes[target][rank])
                self.total -= float(self.changes[target][rank])
                self.ranks[target] = rank + 1
            elif out:
                _, target, rank = heappop(out)
                self.left += int(self.sizes[target][rank] - self.sizes[target][rank - 1])
                self.total += float(self.changes[target][rank - 1])
                self.ranks[target] = rank - 1
            else:
                break
            if (offer := self._return_offer(target, sign)) is not None:
                heappush(back, offer)
            if (offer := self._drop_offer(target, sign)) is not None:
                heappush(out, offer)

    def _return_offer(self, target: int, sign: float) -> Offer | None:
        """The component dropped last, if taking it back helps; largest change first."""
        rank = self.ranks[target]
        if rank >= self.highest[target]:
            return None
        change = sign * float(self.changes[target][rank])
        return (-change, target, rank) if change > 0 else None

    def _drop_offer(self, target: int, sign: float) -> Offer | None:
        """The last component, if dropping it helps; smallest change first."""
        rank = self.ranks[target]
        if rank <= self.lowest[target]:
            return None
        change = -sign * float(self.changes[target][rank - 1])
        return (change, target, rank) if change > 0 else None

    def _discard(self, offers: list[Offer]) -> None:
        """Remove offers that are outdated, or would carry the sum further to the other side."""
        while offers:
            size, target, rank = offers[0]
            if self.ranks[target] == rank and abs(size) < 2 * abs(self.total):
                return
            heappop(offers)

    def _cost(self, offer: Offer) -> int:
        """Bytes of taking a component back."""
        _, target, rank = offer
        return int(self.sizes[target][rank + 1] - self.sizes[target][rank])
