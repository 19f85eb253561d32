"""What a stored layer has to stand for, and what its errors cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from spectrim.linalg.least_squares import least_squares_map
from spectrim.linalg.psd import cholesky_damped
from spectrim.linalg.rounding import Metric
from spectrim.linalg.scaling import row_and_column_sizes
from spectrim.linalg.truncated import leading_factors
from spectrim.tolerances import LEAST_SQUARES_RIDGE


@dataclass(frozen=True, eq=False)
class Source:
    """One target before it is stored.

    Attributes:
        name: the target's module path, for messages.
        W: the map wanted, (out, in) fp64. Where inputs are shifted it is the one that gives the
            original outputs best on them.
        bias: (out,), or None.
        factors: `up` (out, k) and `down` (k, in), fp64, where W is their product.
        C: second moment of the inputs, (in, in), any scale; None counts all directions alike.
        G: second moment of the output gradients, (out, out), positive definite; None likewise.
    """

    name: str
    W: Tensor
    bias: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    C: Tensor | None = None
    G: Tensor | None = None

    @cached_property
    def metric(self) -> Metric | None:
        """Of the inputs, for rounding; None without moments or where no input was ever seen."""
        if self.C is None or not self.C.any():
            return None
        _, columns = row_and_column_sizes(self.W)
        return Metric.of(self.C.to(self.W), name=self.name, sizes=columns)

    @cached_property
    def root(self) -> Tensor | None:
        """`L` with `L Lᵀ = G`; None where all directions count alike."""
        return None if self.G is None else cholesky_damped(self.G, name=self.name)[0]

    def leading(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best `up` (out, k) and `down` (k, in) for W in both moments, `upᵀ G up = I`."""
        return leading_factors(self.W, self.C, self.root, rank, name=self.name)

    def beside(self, part: Tensor, rank: int) -> Source:
        """What is left to stand for beside `part` (out, in), with its best factors of a rank."""
        W = self.W - part
        factors = leading_factors(W, self.C, self.root, rank, name=self.name)
        rest = replace(self, W=W, bias=None, factors=factors)
        # The same moments: neither is factored a second time.
        rest.__dict__.update(metric=self.metric, root=self.root)
        return rest

    def metric_behind(self, first: Tensor) -> Metric | None:
        """Of what a first factor (k, in) passes on: `first C firstᵀ`."""
        seen = first @ first.mT if self.C is None else first @ self.C.to(first) @ first.mT
        return Metric.of(seen, name=self.name) if self.C is not None and seen.any() else None

    def refitted(self, start: Tensor, first: Tensor, W: Tensor | None = None) -> Tensor:
        """The map (m, k) from what `first` (k, in) passes on to W's outputs, on the inputs.

        Directions without data keep `start`.
        """
        W = self.W if W is None else W
        seen = first if self.C is None else first @ self.C.to(first)
        solved, _ = least_squares_map(
            W @ seen.mT,
            first @ seen.mT,
            start=start,
            name=self.name,
            ridge=LEAST_SQUARES_RIDGE,
        )
        return solved

    def orthonormal(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The same product with `upᵀ G up = I`: errors of `down` then cost alike in all rows."""
        L = self.root
        if L is None:
            Q, R = torch.linalg.qr(up)
            return Q, R @ down
        Q, R = torch.linalg.qr(L.mT @ up)
        return torch.linalg.solve_triangular(L.mT, Q, upper=True), R @ down

    def loss(self, approximation: Tensor) -> float:
        """`½ tr(G E C Eᵀ)` of an approximation (out, in)."""
        E = approximation.double() - self.W
        right = E if self.C is None else E @ self.C.to(E)
        left = E if self.G is None else self.G.to(E) @ E
        return max(0.5 * float((left * right).sum()), 0.0)

    def relative_error(self, approximation: Tensor) -> float:
        """`‖E X‖ / ‖W X‖` on the inputs, or in Frobenius norms without them."""
        E, scale = approximation.double() - self.W, self._norm(self.W)
        return float(self._norm(E) / scale) if scale > 0 else 0.0

    def _norm(self, E: Tensor) -> Tensor:
        return E.norm() if self.C is None else ((E @ self.C.to(E)) * E).sum().clamp_min(0.0).sqrt()
