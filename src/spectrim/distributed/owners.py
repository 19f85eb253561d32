"""Who computes what: jobs of unequal cost shared out so that the busiest process has little more.

Greedy: the most expensive job first, each to whoever has least so far (Graham, 1969: never more
than 4/3 of the best possible).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def factorisation_cost(m: int, n: int) -> int:
    """Cost of decomposing an (m, n) matrix up to a constant: `m n min(m, n)`."""
    return m * n * min(m, n)


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that does each job; every process comes to the same answer.

    Args:
        costs: of the jobs, in any unit.
        ranks: number of processes.
    """
    if ranks < 1:
        raise ValueError(f"{ranks} processes cannot share anything, expected at least 1")
    heap = [(0.0, rank) for rank in range(ranks)]
    found = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        found[job] = rank
        heapq.heappush(heap, (load + costs[job], rank))
    return found


def loads(costs: Sequence[float], owned: Sequence[int], ranks: int) -> list[float]:
    """Summed cost per rank."""
    sums = [0.0] * ranks
    for cost, rank in zip(costs, owned, strict=True):
        sums[rank] += cost
    return sums


def share(count: int, rank: int, ranks: int) -> slice:
    """The rank's part of `count` things in a row; parts are contiguous and differ by one at most.

    Contiguous, because held-out windows are spread evenly: every `ranks`-th window would give all
    of them to one process.
    """
    return slice(count * rank // ranks, count * (rank + 1) // ranks)
