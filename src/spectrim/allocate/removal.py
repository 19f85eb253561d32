"""In which order components are removed: by one key, or by ZS-SVD's two heaps.

A pool holds every component that may be dropped, sorted by key (ties: target name, then tail
first), so that a component's index in the pool stands for its key. That makes the heaps heaps of
small integers: a million drops take about a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush, heapreplace

import numpy as np

END = -(1 << 62)
"""Stands for "no further offer"; no pool is that large."""

BATCH = 1 << 14
"""Drops between two looks at the goal."""


@dataclass(frozen=True, eq=False)
class Pool:
    """Components that may be dropped, in the order of their keys.

    Attributes:
        target: index of the component's target, int64 (N,).
        position: index of the component in its target, 0 is the head, int64 (N,).
        change: signed predicted loss change of the drop, fp64 (N,).
        next: pool index of the same target's next component towards the head, -1 after the
            last, int64 (N,).
        heads: pool indices of the targets' tail components, where dropping starts.
    """

    target: np.ndarray
    position: np.ndarray
    change: np.ndarray
    next: np.ndarray
    heads: np.ndarray


def make_pool(
    targets: Sequence[int],
    lowest: Sequence[int],
    changes: Sequence[np.ndarray],
    keys: Sequence[np.ndarray],
) -> Pool:
    """Pool the components of some targets.

    Args:
        targets: their indices, in the order that breaks ties.
        lowest: least rank of each; components below it are not for dropping.
        changes: predicted loss changes of each, by component, head first.
        keys: what the pool is sorted by, likewise.
    """
    sizes = np.array([c.size - k for c, k in zip(changes, lowest, strict=True)], dtype=np.int64)
    if sizes.sum() == 0:
        empty = np.empty(0, dtype=np.int64)
        return Pool(empty, empty, np.empty(0), empty, empty)
    tails = [slice(None, k - 1 if k else None, -1) for k in lowest]
    key = np.concatenate([x[t] for x, t in zip(keys, tails, strict=True)])
    change = np.concatenate([x[t] for x, t in zip(changes, tails, strict=True)])
    position = np.concatenate(
        [np.arange(c.size - 1, k - 1, -1) for c, k in zip(changes, lowest, strict=True)]
    )
    order = np.argsort(key, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(order.size)
    following = np.append(place[1:], -1)
    ends = np.cumsum(sizes[sizes > 0])
    following[ends - 1] = -1
    return Pool(
        target=np.repeat(np.array(targets, dtype=np.int64), sizes)[order],
        position=position[order],
        change=change[order],
        next=following[order],
        heads=place[np.append(0, ends[:-1])],
    )


def by_key(pool: Pool, *, ordered: bool) -> np.ndarray:
    """Pool indices by ascending key; `ordered` drops every target's tail first.

    Always taking the least key among the targets' tails is the same as sorting by the largest
    key so far of each target.
    """
    count = pool.target.size
    if not ordered or count == 0:
        return np.arange(count)
    # Unique integer keys sort much faster than pairs; positions stay far below 2^32.
    tail_first = np.argsort((pool.target << 32) - pool.position)
    start = np.append(True, np.diff(pool.target[tail_first]) != 0)
    # Offsets that grow from target to target keep one running maximum from crossing over.
    offset = (np.cumsum(start) - 1) * count
    reached = np.maximum.accumulate(tail_first + offset) - offset
    return tail_first[np.argsort(reached * count + np.arange(count))]


def by_sign(pool: Pool) -> np.ndarray:
    """Zero-sum order without spectral order: any component is on offer at any time."""
    rising = np.flatnonzero(pool.change >= 0).tolist()
    falling = np.flatnonzero(pool.change < 0).tolist()
    change = pool.change.tolist()
    path: list[int] = []
    total, i, j = 0.0, 0, 0
    while i < len(rising) or j < len(falling):
        if i < len(rising) and (total <= 0 or j == len(falling)):
            taken = rising[i]
            i += 1
        else:
            taken = falling[j]
            j += 1
        total += change[taken]
        path.append(taken)
    return np.array(path, dtype=np.int64)


def by_two_heaps(pool: Pool, savings: np.ndarray, goal: int) -> np.ndarray:
    """Zero-sum order, every target's tail first, up to the drop that reaches the goal.

    Args:
        pool: sorted by |dL|.
        savings: bytes that dropping each component saves, int64 (N,).
        goal: bytes to save.
    """
    change = pool.change.tolist()
    rises = pool.change >= 0
    # The next offer as one number: n if rising, ~n if falling, END if there is none.
    codes = np.where(rises[pool.next], pool.next, ~pool.next)
    following = np.where(pool.next < 0, END, codes).tolist()
    rising = [h for h in pool.heads.tolist() if rises[h]]
    falling = [h for h in pool.heads.tolist() if not rises[h]]
    heapify(rising)
    heapify(falling)
    path: list[int] = []
    total, left = 0.0, goal
    while left > 0 and (rising or falling):
        start = len(path)
        # The goal is looked at once per batch: this loop is all that a plan takes time for.
        for _ in range(min(BATCH, len(change) - start)):
            if rising and (total <= 0 or not falling):
                taken = rising[0]
                offer = following[taken]
                if offer >= 0:
                    heapreplace(rising, offer)
                else:
                    heappop(rising)
                    if offer != END:
                        heappush(falling, ~offer)
            else:
                taken = falling[0]
                offer = following[taken]
                if offer >= 0:
                    heappop(falling)
                    heappush(rising, offer)
                elif offer != END:
                    heapreplace(falling, ~offer)
                else:
                    heappop(falling)
            total += change[taken]
            path.append(taken)
        saved = np.cumsum(savings[path[start:]])
        if saved[-1] >= left:
            return np.array(path[: start + 1 + int(np.searchsorted(saved, left))], dtype=np.int64)
        left -= int(saved[-1])
    return np.array(path, dtype=np.int64)


def occurrences(targets: np.ndarray) -> np.ndarray:
    """How often each entry's value came before it: 0 for a target's first drop, then 1, ..."""
    order = np.argsort(targets, kind="stable")
    ranked = targets[order]
    start = np.append(True, ranked[1:] != ranked[:-1]) if ranked.size else np.empty(0, dtype=bool)
    index = np.arange(ranked.size)
    counts = np.empty_like(index)
    counts[order] = index - np.maximum.accumulate(np.where(start, index, 0))
    return counts
