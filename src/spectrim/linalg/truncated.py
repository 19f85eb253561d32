"""Truncated decompositions that only ever factor the smaller side of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.linalg.psd import symmetric_eigh


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


def leading_factors(
    W: Tensor, C: Tensor | None, root: Tensor | None, rank: int, *, name: str
) -> tuple[Tensor, Tensor]:
    """`min ½ tr(G E C Eᵀ)` over `E = W - B A`: `B = L⁻ᵀ U_k`, `A = U_kᵀ Lᵀ W`, with `BᵀGB = I`.

    Args:
        W: fp64, (out, in).
        C: second moment of the inputs, (in, in); None for the identity.
        root: lower `L` with `G = L Lᵀ`, (out, out); None for the identity.
        rank: k, at most min(out, in).
        name: whose matrix this is, for messages.

    Returns:
        `B` (out, k) and `A` (k, in). `C` enters by its products only and may be singular.

    Raises:
        NumericalError: the eigenproblem did not converge.
    """
    whitened = W if root is None else root.mT @ W
    space = column_space(whitened)
    S = space.core @ (space.core if C is None else space.core @ C.to(W)).mT
    _, directions = symmetric_eigh((S + S.mT) / 2, name=name)
    U = space.lift(directions[:, :rank])
    up = U if root is None else torch.linalg.solve_triangular(root.mT, U, upper=True)
    return up, U.mT @ whitened
