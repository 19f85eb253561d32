"""Damped least squares against second moments: one Cholesky factorisation, no inverse.

`min_V Σ ‖y − V x‖² + δ ‖V − V₀‖²_F` with `C = Σ x xᵀ`, `K = Σ y xᵀ` and `δ = ridge · mean(diag C)`
has the solution `V = V₀ + (K − V₀ C)(C + δ I)⁻¹`. Directions that `x` never visits keep `V₀`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectrim.linalg.psd import cholesky_damped, finite
from spectrim.tolerances import LEAST_SQUARES_RIDGE

__all__ = ["least_squares_map", "solve_damped"]


def solve_damped(C: Tensor, right: Tensor, *, name: str, ridge: float) -> Tensor:
    """`(C + d · mean(diag C) · I)⁻¹ right` by Cholesky.

    Args:
        C: symmetric positive semi-definite, (n, n).
        right: right-hand sides, (n, m).
        name: whose matrix this is, for messages.
        ridge: first `d`; it escalates where the matrix stays singular.

    Raises:
        NotPositiveDefiniteError, NonFiniteError, NumericalError: see `cholesky_damped`.
    """
    L, _ = cholesky_damped(C, name=name, ridge=ridge)
    return torch.cholesky_solve(finite(right, name=name, what="the right-hand side"), L)


def least_squares_map(
    cross: Tensor, C: Tensor, *, start: Tensor, name: str, ridge: float = LEAST_SQUARES_RIDGE
) -> tuple[Tensor, float]:
    """The map from x to y nearest to `start` in the sense of the module's ridge problem.

    Args:
        cross: `K = Σ y xᵀ`, (m, n).
        C: `Σ x xᵀ`, (n, n).
        start: `V₀`, (m, n); what directions without data keep.
        name: whose matrix this is, for messages.
        ridge: relative to the mean diagonal of `C`.

    Returns:
        `V` (m, n) in fp64 and the relative damping that was needed.

    Raises:
        NotPositiveDefiniteError, NonFiniteError, NumericalError: see `cholesky_damped`.
    """
    start = finite(start, name=name, what="the starting map")
    if not C.any():
        return start, 0.0
    L, damping = cholesky_damped(C, name=name, ridge=ridge)
    residual = finite(cross, name=name, what="the cross moment") - start @ C.to(torch.float64)
    return start + torch.cholesky_solve(residual.mT, L).mT, damping
