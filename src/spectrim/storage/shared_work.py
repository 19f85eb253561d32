"""One work folder for all processes of a team: the leader reads and writes it, all know its pieces.

Only the leader holds the lock and touches the files, so the others need no common file system:
what was finished earlier is read once and broadcast. All methods are called by every process.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spectrim.distributed.team import Team
from spectrim.storage.work import WorkFolder

__all__ = ["Piece", "SharedWork", "Work"]


class Piece(Protocol):
    """A finished piece, for reading tensors from."""

    @property
    def path(self) -> Path:
        """The file that it is, or was read from by another process."""
        ...

    @property
    def entries(self) -> Mapping[str, Any]:
        """Its tensors, by name."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, as stored."""
        ...


class Work(Protocol):
    """What a run asks of its work folder, be it one process or several."""

    @property
    def path(self) -> Path:
        """The folder."""
        ...

    @property
    def finished(self) -> Collection[str]:
        """Keys of the finished pieces."""
        ...

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Say whose work this is; earlier work is verified and goes on."""

    def write(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Finish a piece."""

    def load(self, key: str) -> tuple[Piece, dict[str, Any]]:
        """A finished piece and its facts."""
        ...


@dataclass(frozen=True)
class _Received:
    """A piece that the leader has read."""

    path: Path
    entries: dict[str, Tensor]

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self.entries[name]


class SharedWork:
    """A work folder among several processes.

    Args:
        path: the folder.
        folder: the same with its lock held, on the leader; None elsewhere.
        team: the processes.
    """

    def __init__(self, path: Path, folder: WorkFolder | None, team: Team):
        self.path = path
        self._folder, self._team = folder, team
        self._finished: dict[str, None] = {}

    @property
    def finished(self) -> Collection[str]:
        """Keys of the finished pieces."""
        return self._finished.keys()

    def begin(self, identity: Mapping[str, Any]) -> None:
        """Say whose work this is; earlier work is verified, by the leader, and goes on."""
        found: list[str] = []
        if self._folder is not None:
            self._folder.begin(identity)
            found = list(self._folder.finished)
        self._finished = dict.fromkeys(self._team.gather(found)[0])

    def write(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Finish a piece, which is the same everywhere; the others do not wait for the disk."""
        if self._folder is not None:
            self._folder.write(key, tensors, facts)
        self._finished[key] = None

    def load(self, key: str) -> tuple[Piece, dict[str, Any]]:
        """A finished piece and its facts, from the leader to all."""
        tensors: dict[str, Tensor] = {}
        message = None
        if self._folder is not None:
            file, facts = self._folder.load(key)
            tensors = file.read_all()
            kinds = {n: [str(t.dtype).removeprefix("torch."), *t.shape] for n, t in tensors.items()}
            message = [kinds, facts]
        kinds, facts = self._team.gather(message)[0]
        for name, (dtype, *shape) in kinds.items():
            if name not in tensors:
                tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        self._team.broadcast_((tensors[name] for name in kinds), 0)
        return _Received(self.path, tensors), facts
