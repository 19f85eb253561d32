"""Truncated decompositions that only ever factor the smaller side of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.linalg.psd import finite, symmetric_eigh

__all__ = ["ColumnSpace", "column_space", "core_of", "leading_eigenvectors", "truncated_svd"]


@dataclass(frozen=True)
class ColumnSpace:
    """`W = lift(core)` with `core` no taller than wide.

    Attributes:
        core: (min(out, in), in).
        basis: orthonormal columns (out, in), None where `W` is not taller than wide and is
            its own core.
    """

    core: Tensor
    basis: Tensor | None

    def lift(self, directions: Tensor) -> Tensor:
        """Columns given in the core's coordinates, in the coordinates of W's output."""
        return directions if self.basis is None else self.basis @ directions


def column_space(W: Tensor) -> ColumnSpace:
    """Reduce a tall matrix to its square triangular factor; others are left as they are.

    Every output that `W` can produce lies in the basis, so no rank-k answer of any objective
    `‖(W − W') R‖` leaves it, and eigenproblems shrink from out x out to in x in.
    """
    if W.shape[0] <= W.shape[1]:
        return ColumnSpace(W, None)
    basis, core = torch.linalg.qr(W)
    return ColumnSpace(core, basis)


def core_of(W: Tensor) -> Tensor:
    """The core of `column_space` alone, (min(out, in), in): all that a spectrum depends on."""
    return W if W.shape[0] <= W.shape[1] else torch.linalg.qr(W, mode="r").R


def leading_eigenvectors(
    S: Tensor, count: int | None = None, *, name: str
) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues, descending, and their eigenvectors, of a symmetric matrix.

    Args:
        S: (n, n); its symmetric part is used.
        count: how many, all by default.
        name: whose matrix this is, for messages.

    Raises:
        ValueError: `count` is outside 1..n.
        NonFiniteError, NumericalError: non-finite entries, or no convergence.
    """
    if count is not None and not 1 <= count <= S.shape[0]:
        raise ValueError(f"{name}: {count} eigenvectors asked of a {S.shape[0]}-dimensional matrix")
    S = finite(S, name=name, what="a symmetric matrix")
    values, vectors = symmetric_eigh((S + S.mT) / 2, name=name)
    return values[:count], vectors[:, :count]


def truncated_svd(W: Tensor, rank: int, *, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets `U (out, k), s (k,), Vh (k, in)` in fp64.

    A QR factorisation of the longer side comes first, so that the cost beyond one pass over `W`
    is that of the smaller side only, at the full accuracy of a singular value decomposition.

    Raises:
        ValueError: `rank` is outside 1..min(out, in).
        NonFiniteError: `W` is not finite.
    """
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"{name}: rank {rank} is outside 1..{min(W.shape)}")
    W = finite(W, name=name, what="the matrix")
    if W.shape[0] < W.shape[1]:
        U, s, Vh = truncated_svd(W.mT, rank, name=name)
        return Vh.mT, s, U.mT
    basis, core = torch.linalg.qr(W)
    U, s, Vh = torch.linalg.svd(core)
    return basis @ U[:, :rank], s[:rank], Vh[:rank]
