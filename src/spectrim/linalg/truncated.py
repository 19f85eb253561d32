"""Truncated decompositions that only ever factor the smaller side of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
