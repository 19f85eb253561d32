"""Hidden states of all windows, of which every process holds its part, lent where they are needed.

Training draws its batches from all windows, in the order of one process. The windows of a batch
lie on the ranks as chance has it; those of a rank that has too many are sent to one with too few,
so that every rank works on an equal part of every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectrim.devices import HOST
from spectrim.distributed.owners import share
from spectrim.distributed.team import Team


def assignment(holders: Sequence[int], ranks: int) -> list[int]:
    """Who works on each window of a batch, given who holds it: equal parts, few windows moved.

    Ranks that hold most take the remainder; a rank gives away its last windows.
    """
    held = [holders.count(rank) for rank in range(ranks)]
    part, left = divmod(len(holders), ranks)
    fullest = sorted(range(ranks), key=lambda rank: (-held[rank], rank))
    quota = dict.fromkeys(range(ranks), part) | dict.fromkeys(fullest[:left], part + 1)
    free = [r for r in range(ranks) for _ in range(max(0, quota[r] - held[r]))]
    kept = dict.fromkeys(range(ranks), 0)
    found = []
    for holder in holders:
        if kept[holder] < quota[holder]:
            kept[holder] += 1
            found.append(holder)
        else:
            found.append(free.pop(0))
    return found


class _Part:
    """One stream seen as a whole: windows by their number among all."""

    def __init__(self, local: Any, windows: int, first: int):
        self.local, self.windows, self.first = local, windows, first
        self.lent: dict[int, Tensor] = {}

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N windows of all ranks, T tokens, d width)."""
        _, tokens, width = self.local.shape
        return self.windows, tokens, width

    @property
    def dtype(self) -> torch.dtype:
        """Of the states."""
        return self.local.dtype

    def read(self, rows: Tensor, device: torch.device | str = HOST) -> Tensor:
        """The states of windows that are here or have been lent, (len, T, d), on `device`."""
        if not any(row in self.lent for row in rows.tolist()):
            return self.local.read(rows - self.first, device)
        return torch.stack([self._one(row) for row in rows.tolist()]).to(device)

    def _one(self, row: int) -> Tensor:
        if row in self.lent:
            return self.lent[row]
        return self.local.read(torch.tensor([row - self.first]))[0]


class Pool:
    """The windows of one training on all ranks of a team.

    Attributes:
        team: the processes.
        states: the streams, in the given order, with windows numbered over all ranks.
    """

    def __init__(self, team: Team, windows: int, streams: Sequence[Any]):
        self.team, self._windows = team, windows
        mine = team.share(windows)
        self._here = range(mine.start, mine.stop)
        self._ends = [share(windows, rank, team.size).stop for rank in range(team.size)]
        # A process alone has all windows, and reads its streams as they are.
        self._parts = [] if team.size == 1 else [_Part(s, windows, mine.start) for s in streams]
        self.states: list[Any] = list(streams) if team.size == 1 else list(self._parts)

    def here(self, rows: Tensor) -> Tensor:
        """Those of some windows that this rank holds; not collective."""
        return rows[[row in self._here for row in rows.tolist()]] if self._parts else rows

    def spread(self, rows: Tensor) -> Tensor:
        """The windows of a batch that this rank is to work on, with their states here; collective.

        What was lent for the batch before is forgotten.
        """
        if not self._parts:
            return rows
        numbers = rows.tolist()
        holders = [next(r for r, end in enumerate(self._ends) if row < end) for row in numbers]
        workers = assignment(holders, self.team.size)
        moved = [i for i in range(len(numbers)) if holders[i] != workers[i]]
        moves = [(holders[i], workers[i]) for i in moved]
        for part in self._parts:
            _, tokens, width = part.shape

            def content(parcel: int, part: _Part = part) -> Tensor:
                return part._one(numbers[moved[parcel]])

            part.lent = {}
            empty = torch.empty(tokens, width, dtype=part.dtype, device="meta")
            arrived = self.team.move(moves, content, empty)
            part.lent = {numbers[moved[parcel]]: states for parcel, states in arrived.items()}
        return rows[[worker == self.team.rank for worker in workers]]
