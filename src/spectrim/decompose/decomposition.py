"""`W ≈ up · down` with ordered components: one record for every objective and every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Decomposition:
    """Ordered factors of one target: the first k are the objective's best rank-k answer.

    Errors are sums of the components that are left out, never differences of large numbers, so
    that they stay exact where almost nothing is lost.

    Attributes:
        up: `B`, shape (out, r).
        down: `A`, shape (r, in).
        energy: squared error that each component removes, shape (r,), descending, in the units
            of the objective (a sum over calibration tokens where the objective has inputs). A
            spectrum, which holds no component, has the energies of all min(out, in).
        total: the objective's value for the zero matrix (rank 0).
        irreducible: the value that remains at full rank; zero except for anchored objectives.
        damping: relative damping that the decomposition needed, 0.0 if none.
        ridge: relative ridge of the least-squares map behind an anchored objective, else None.
        tail: summed energy of the components that are not held; None lets it follow from the
            other numbers (0 where all components are held).
    """

    up: Tensor
    down: Tensor
    energy: Tensor
    total: float
    irreducible: float = 0.0
    damping: float = 0.0
    tail: float | None = None
    ridge: float | None = None

    def __post_init__(self) -> None:
        if self.tail is None:
            complete = self.rank >= min(self.up.shape[0], self.down.shape[1])
            left = self.total - self.irreducible - float(self.energy.sum())
            object.__setattr__(self, "tail", 0.0 if complete else max(left, 0.0))

    @property
    def rank(self) -> int:
        """Number of components held."""
        return self.up.shape[1]

    def cut(self, k: int) -> tuple[Tensor, Tensor]:
        """The first k components as `(up (out, k), down (k, in))`."""
        if not 1 <= k <= self.rank:
            raise ValueError(f"rank {k} is outside 1..{self.rank}")
        return self.up[:, :k], self.down[:k]

    def errors(self) -> Tensor:
        """The objective's exact value at every rank: shape (r + 1,), entry k is rank k."""
        remaining = torch.cat([self.energy, self.energy.new_tensor([self.tail or 0.0])])
        return remaining.flip(0).cumsum(0).flip(0) + self.irreducible

    def error(self, k: int) -> float:
        """The objective's exact value at rank k, in the units of `energy`."""
        if not 0 <= k <= self.rank:
            raise ValueError(f"rank {k} is outside 0..{self.rank}")
        return self.irreducible + (self.tail or 0.0) + float(self.energy[k:].sum())

    def relative_error(self, k: int) -> float:
        """`error(k) / total`, 0 for a zero matrix."""
        return self.error(k) / self.total if self.total > 0 else 0.0
