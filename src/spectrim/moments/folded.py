"""Many targets' moments at a time in a third of the memory: symmetric sums as fp32 panels.

Moments are used in fp64. Where those of all blocks have to be in memory at the same time, their
symmetric matrices are kept folded, in fp32, and unfolded when a target's turn comes. The rounding
is that of the fp32 products behind the sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from spectrim.moments.moments import Record
from spectrim.moments.symmetric import SymmetricSum

_SYMMETRIC = ("C", "shifted", "G")


class Folded(Mapping[str, Record]):
    """Records by name; what `__getitem__` returns is in memory of its own.

    Args:
        dtype: of the panels; fp64 keeps everything exactly.
    """

    def __init__(self, dtype: torch.dtype = torch.float32):
        self._dtype = dtype
        self._records: dict[str, tuple[Any, dict[str, SymmetricSum]]] = {}

    def put(self, name: str, record: Record) -> None:
        """Keep a record under a name."""
        present = {f.name: getattr(record, f.name) for f in fields(record)}
        panels = {
            key: SymmetricSum.of(present[key], self._dtype)
            for key in _SYMMETRIC
            if isinstance(present.get(key), Tensor)
        }
        self._records[name] = replace(record, **dict.fromkeys(panels, None)), panels

    def take(self, records: Mapping[str, Record]) -> None:
        """Keep records under their names; those that are folded already are shared."""
        if isinstance(records, Folded):
            self._records |= records._records
        else:
            for name, record in records.items():
                self.put(name, record)

    def merge(self, records: Mapping[str, Record]) -> None:
        """Add other sums to those of the same names."""
        for name, record in records.items():
            self.put(name, self[name].merge(record))

    def only(self, names: Iterable[str]) -> Folded[Record]:
        """Some of the records, in the same memory."""
        chosen = Folded[Record](self._dtype)
        chosen._records = {name: self._records[name] for name in names if name in self._records}
        return chosen

    def forget(self, names: Iterable[str]) -> None:
        """Let records go, here alone where others share them."""
        for name in names:
            self._records.pop(name, None)

    def folded(self, name: str) -> tuple[Record, dict[str, SymmetricSum]]:
        """A record without its symmetric matrices, and their panels by field."""
        return self._records[name]

    def __getitem__(self, name: str) -> Record:
        rest, panels = self._records[name]
        return replace(rest, **{key: one.whole() for key, one in panels.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)
