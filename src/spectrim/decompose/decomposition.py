"""`W ≈ up · down` with ordered components: one record for every objective and every rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Decomposition"]


@dataclass(frozen=True)
class Decomposition:
    """Ordered factors of one target: cutting after the first k is the objective's best rank-k answer.

    Attributes:
        up: `B`, shape (out, r).
        down: `A`, shape (r, in).
        energy: squared error that each component removes, shape (r,), descending, in the units
            of the objective (a sum over calibration tokens where the objective has inputs).
        total: the objective's value for the zero matrix (rank 0).
        irreducible: the value that remains at full rank; zero except for anchored objectives.
        damping: relative damping that the decomposition needed, 0.0 if none.
    """

    up: Tensor
    down: Tensor
    energy: Tensor
    total: float
    irreducible: float = 0.0
    damping: float = 0.0

    @property
    def rank(self) -> int:
        """Number of components held."""
        return self.up.shape[1]

    def cut(self, k: int) -> tuple[Tensor, Tensor]:
        """The first k components as `(up (out, k), down (k, in))`."""
        if not 1 <= k <= self.rank:
            raise ValueError(f"rank {k} is outside 1..{self.rank}")
        return self.up[:, :k], self.down[:k]

    def error(self, k: int) -> float:
        """The objective's exact value at rank k, in the units of `energy`."""
        return max(self.total - float(self.energy[:k].sum()), self.irreducible, 0.0)

    def relative_error(self, k: int) -> float:
        """`error(k) / total`, 0 for a zero matrix."""
        return self.error(k) / self.total if self.total > 0 else 0.0
