"""Round a matrix to a grid so that the error is small on its inputs.

The error `E = Ŵ - W` costs `tr(E C Eᵀ)`. With `C = N diag(d) Nᵀ`, N unit lower triangular, it is
`Σ_j d_j ‖η_j‖²` with `η = E N`, `η_j = e_j + Σ_{k>j} e_k N_kj`. Columns are rounded from the last
to the first, each to the value nearest to `w_j - Σ_{k>j} e_k N_kj`: `η_j` is then no more than the
rounding of one column, and what earlier columns got wrong is made up for (GPTQ, arXiv 2210.17323;
in this form LDLQ, arXiv 2307.13304). Channels with the largest second moment are put last and so
rounded first, while everything else can still make up for them.

Differences from the papers: no inverse is formed, all rows at once, fp64, and the damping is a
share of every channel's own second moment, so that rescaled channels are damped alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectrim.linalg.psd import cholesky_damped, shrunk, symmetrized
from spectrim.linalg.turn import COLUMNS, Turn, nearest
from spectrim.tolerances import ROUNDING_DAMPING, ROUNDING_PRIOR


@dataclass(frozen=True, eq=False)
class Grid:
    """The values `step · code + offset` that every entry of a matrix can take.

    Attributes:
        step: (rows, columns); 0 where only the offset can be stored. May be negative.
        offset: (rows, columns), or None for 0.
        low: smallest code, an int, or one per row, (rows, 1).
        high: largest code, likewise.
        float8: whether codes are numbers of float8 (e4m3) instead of integers.
    """

    step: Tensor
    offset: Tensor | None
    low: Any
    high: Any
    float8: bool = False

    @classmethod
    def stacked(cls, grids: Sequence[Grid]) -> Grid:
        """Grids of one kind of code without offsets, one below the other.

        Many roundings at the price of one pass.
        """
        ends = [
            torch.cat([torch.full_like(g.step[:, :1], end).double() for g, end in pairs])
            for pairs in ([(g, g.low) for g in grids], [(g, g.high) for g in grids])
        ]
        step = torch.cat([g.step.double() for g in grids])
        return cls(step, None, *ends, float8=grids[0].float8)

    def codes(self, values: Tensor, columns: slice = slice(None)) -> Tensor:
        """The codes nearest to fp64 values of some columns, int64, or fp64 if float8."""
        step = self.step[:, columns].double()
        # A group of zeros, or one below what its scale's dtype holds, has step 0 and codes 0.
        divisor = torch.where(step != 0, step, torch.ones_like(step))
        shifted = values if self.offset is None else values - self.offset[:, columns].double()
        codes = nearest((shifted / divisor).clamp(self.low, self.high), self.float8)
        codes *= step != 0
        return codes if self.float8 else codes.long()

    def values(self, codes: Tensor, columns: slice = slice(None), dtype=torch.float32) -> Tensor:
        """What the codes of some columns stand for."""
        found = codes.to(dtype) * self.step[:, columns].to(dtype)
        return found if self.offset is None else found + self.offset[:, columns].to(dtype)


def by_column(values: Tensor, group: int, columns: int) -> Tensor:
    """Numbers per group, (rows, groups), repeated for the columns of each: (rows, columns)."""
    return values.repeat_interleave(group, dim=1)[:, :columns]


@dataclass(frozen=True, eq=False)
class Metric:
    """A second moment, factored for rounding with feedback.

    Attributes:
        C: the moment as given, (n, n) fp64.
        order: channel at every position, ascending in its second moment, (n,).
        N: unit lower triangular, in that order.
        d: what is left of every position's second moment given those before it, (n,).
    """

    C: Tensor
    order: Tensor
    N: Tensor
    d: Tensor

    @classmethod
    def of(cls, C: Tensor, *, name: str, sizes: Tensor | None = None) -> Metric:
        """Factor a moment matrix, damped.

        With the squared sizes of the columns that are rounded it is shrunk a little toward
        channels of equal worth. A channel that others predict, or that hardly speaks, would
        otherwise take up everything they pass on, to the end of its grid and beyond.

        Raises:
            NotPositiveDefiniteError, NonFiniteError, NumericalError: see `cholesky_damped`.
        """
        C = symmetrized(C, name=name)
        weighed = C if sizes is None else shrunk(C, ROUNDING_PRIOR, sizes.to(C))
        order = weighed.diagonal().argsort(stable=True)
        damped = weighed[order][:, order].clone()
        # A channel that calibration never saw is as important as the least that it has seen.
        own = damped.diagonal().clone()
        seen = own[own > 0]
        unseen = seen.min() if seen.numel() else own.new_ones(())
        damped.diagonal().add_(torch.where(own > 0, ROUNDING_DAMPING * own, unseen))
        L, _ = cholesky_damped(damped, name=name)
        return cls(C, order, L / L.diagonal(), L.diagonal().square())

    @property
    def importance(self) -> Tensor:
        """What a squared rounding error costs by channel, (n,)."""
        found = torch.empty_like(self.d)
        found[self.order] = self.d
        return found

    def loss(self, E: Tensor) -> Tensor:
        """`e C eᵀ` of every row of an error (rows, n), fp64."""
        E = E.double()
        return ((E @ self.C) * E).sum(dim=1)

    def codes(self, W: Tensor, grid: Grid) -> Tensor:
        """Codes of `W` (rows, n) on a grid by rounding with feedback, int64, or fp32 if float8."""
        # Transposed, so that what one column of the matrix needs lies side by side. In fp32: a code
        # is one of a few numbers, and what decides near the middle between two costs the same.
        order, N = self.order, self.N.float()
        W = W.float().mT[order].contiguous()
        step = grid.step.float().mT[order].contiguous()
        divisor = torch.where(step != 0, step, torch.full_like(step, torch.inf))
        offset = None if grid.offset is None else grid.offset.float().mT[order].contiguous()
        E, codes = torch.zeros_like(W), torch.zeros_like(W)
        low, high = (
            end.float().mT[0] if isinstance(end, Tensor) else W.new_full((W.shape[1],), end)
            for end in (grid.low, grid.high)
        )
        for stop in range(W.shape[0], 0, -COLUMNS):
            at = slice(max(0, stop - COLUMNS), stop)
            aims = W[at] - N[stop:, at].mT @ E[stop:]
            parts = (W[at], divisor[at], step[at], None if offset is None else offset[at])
            out = (E[at], codes[at], grid.float8)
            Turn(aims, N[at, at], *parts, low, high, *out).round_columns()
        found = torch.empty_like(codes)
        found[order] = codes
        found = found.mT.contiguous()
        return found if grid.float8 else found.long()
