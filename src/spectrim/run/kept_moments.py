"""Moments of many blocks between the pass that gathers them and the one that uses them.

They lie in the work folder as pieces, one per block, or folded in memory (`moments/folded.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from spectrim.model.anatomy import Block
from spectrim.moments.folded import Folded
from spectrim.moments.moments import Moments, Record
from spectrim.moments.symmetric import SymmetricSum
from spectrim.run.keeping import Keeper
from spectrim.storage.shared_work import Piece


class KeptMoments(Mapping[str, Record]):
    """Moments in the work folder, by target; read when one is asked for.

    Its names are those of all targets (inputs: of every group's first), gathered or not.

    Args:
        load: opens a piece.
        device: where moments are wanted.
        pieces: block -> its piece.
        kind: `out` or `in`.
        record: what they are.
    """

    def __init__(
        self,
        load: Callable[[str], tuple[Piece, Mapping[str, Any]]],
        device: torch.device,
        pieces: Mapping[Block, str],
        kind: str,
        record: type[Record],
    ):
        self._load, self._device = load, device
        self._kind, self._record = kind, record
        self._pieces = {
            target.name: piece
            for block, piece in pieces.items()
            for group in block.groups
            for target in (group.targets if kind == "out" else group.targets[:1])
        }

    def __getitem__(self, name: str) -> Record:
        file, numbers = self._load(self._pieces[name])
        found = restored(file, numbers, self._kind, self._record, self._device, only=name)
        return found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


class ByGroup(Mapping[int, Moments]):
    """Those of one block by the index of a group; read when one is asked for.

    Args:
        block: whose.
        found: of more blocks, by a group's first target; groups that are not there are left out.
    """

    def __init__(self, block: Block, found: Mapping[str, Moments]):
        names = {group.index: group.targets[0].name for group in block.groups}
        self._names = {index: name for index, name in names.items() if name in found}
        self._found = found

    def __getitem__(self, index: int) -> Moments:
        return self._found[self._names[index]]

    def __iter__(self) -> Iterator[int]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def flattened(records: Mapping[str, Folded[Any]]) -> tuple[dict[str, Tensor], dict]:
    """Tensors by `kind/name/field` or, panel by panel, `kind/name/field/place`; the numbers too."""
    tensors, numbers = {}, {}
    for kind, found in records.items():
        for name in found:
            rest, panels = found.folded(name)
            for key, held in panels.items():
                for place, panel in enumerate(held.panels):
                    tensors[f"{kind}/{name}/{key}/{place}"] = panel
            for field in fields(rest):
                if field.name in panels:
                    continue
                value, where = getattr(rest, field.name), f"{kind}/{name}/{field.name}"
                if isinstance(value, Tensor):
                    tensors[where] = value
                else:
                    numbers[where] = value
    return tensors, numbers


def restored(
    file: Piece,
    numbers: Mapping[str, Any],
    kind: str,
    record: type[Record],
    device: torch.device,
    *,
    only: str | None = None,
) -> dict[str, Record]:
    """Records of a piece as `flattened` took them apart; all of them or one."""
    values: dict[str, dict[str, Any]] = {}
    panels: dict[tuple[str, str], dict[int, Tensor]] = {}
    for where in (*file.entries, *numbers):
        found, name, field, *place = where.split("/")
        if found != kind or only not in (None, name):
            continue
        value = numbers[where] if where in numbers else file.read(where).to(device)
        if place:
            panels.setdefault((name, field), {})[int(place[0])] = value
        else:
            values.setdefault(name, {})[field] = value
    for (name, field), parts in panels.items():
        held = SymmetricSum.from_panels([parts[place] for place in sorted(parts)])
        values.setdefault(name, {})[field] = held.whole()
    return {name: record(**given) for name, given in values.items()}


class FinishedInputs:
    """Second moments of the inputs that the finished network has, one block after the other.

    A sequential pass meets them on its way, so that storing needs no pass of its own. They are
    kept folded, in fp32: in the work folder, from which a run goes on, or in memory.
    """

    def __init__(self, keeper: Keeper, device: torch.device):
        self._keeper, self._device = keeper, device
        self._here = Folded[Moments]()

    def keep(self, block: Block, inputs: Folded[Moments]) -> None:
        """Keep a block's moments, by a group's first target."""
        if self._keeper.work is None:
            self._here.take(inputs)
        elif not self._keeper.has(_inputs_key(block)):
            self._keeper.save(_inputs_key(block), *flattened({"in": inputs}))

    def has(self, block: Block) -> bool:
        """Whether a block's moments were kept, by this run or an earlier one.

        None are needed of a block without targets.
        """
        if not block.targets:
            return True
        return self._keeper.has(_inputs_key(block)) or block.targets[0].name in self._here

    def of(self, block: Block) -> Mapping[int, Moments]:
        """A block's moments by a group's index, fp64."""
        key = _inputs_key(block)
        if not self._keeper.has(key):
            return ByGroup(block, self._here)
        # Opened here, where every process of a team is; each reads what it owns when it needs it.
        opened = self._keeper.load(key)
        kept = KeptMoments(lambda _: opened, self._device, {block: key}, "in", Moments)
        return ByGroup(block, kept)


def _inputs_key(block: Block) -> str:
    return f"finished-inputs-{block.index:03d}"
