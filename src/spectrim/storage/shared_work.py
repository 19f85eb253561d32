"""One work folder for all processes of a team: the leader reads and writes it, all know its pieces.

Only the leader's folder lasts, and the others need no common file system: what was finished
earlier is read once and broadcast. Where processes read pieces by themselves later on, the others
keep copies in folders of their own. They are removed at the end; what a killed process leaves of
them is removed by the next run. All methods are called by every process, but for `file`, and for
`load` where there are copies.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from spectrim.distributed.team import Team
from spectrim.storage.tensor_file import TensorFile
from spectrim.storage.work import WorkFolder, open_work


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

    def begin(
        self, identity: Mapping[str, Any], chosen: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Say whose work this is; earlier work is verified and goes on. Returns what was chosen."""
        ...

    def write(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Finish a piece."""

    def load(self, key: str) -> tuple[Piece, dict[str, Any]]:
        """A finished piece and its facts."""
        ...

    def file(self, key: str) -> TensorFile:
        """A finished piece that lies here, for reading tensors from."""
        ...

    def keep_here(self) -> None:
        """From now on this process can read every finished piece by itself."""


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
        self._copies: WorkFolder | None = None
        self._held = ExitStack()

    def __enter__(self) -> SharedWork:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def finished(self) -> Collection[str]:
        """Keys of the finished pieces."""
        return self._finished.keys()

    def begin(
        self, identity: Mapping[str, Any], chosen: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Say whose work this is; earlier work is verified, by the leader, and goes on."""
        found: list[Any] = [[], {}]
        if self._folder is not None:
            decided = self._folder.begin(identity, chosen)
            found = [list(self._folder.finished), decided]
        finished, decided = self._team.gather(found)[0]
        self._finished = dict.fromkeys(finished)
        return decided

    def write(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Finish a piece, which is the same everywhere; without copies only the leader writes."""
        own = self._copies if self._copies is not None else self._folder
        if own is not None:
            own.write(key, tensors, facts)
        self._finished[key] = None

    def keep_here(self) -> None:
        """From now on this process can read every finished piece by itself; collective.

        Raises:
            OutputError: a folder for the copies cannot be written.
        """
        if self._copies is not None:
            return
        copies = self._folder
        if copies is None:
            place = self.path.with_name(f"{self.path.name}.rank{self._team.rank}")
            copies = self._held.enter_context(open_work(place))
            self._held.callback(copies.clear)
            copies.begin_anew()
        for key in self._finished:
            piece, facts = self.load(key)
            if self._folder is None:
                copies.write(key, {name: piece.read(name) for name in piece.entries}, facts)
        self._copies = copies

    def file(self, key: str) -> TensorFile:
        """A finished piece that lies here."""
        assert self._copies is not None  # `keep_here` was called by whoever needs this
        return self._copies.file(key)

    def load(self, key: str) -> tuple[Piece, dict[str, Any]]:
        """A finished piece and its facts; without copies, from the leader to all."""
        if self._copies is not None:
            return self._copies.load(key)
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
