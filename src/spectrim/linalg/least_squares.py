"""Damped least squares against second moments: Cholesky factorisations, no inverse.

`min_V Σ ‖y − V x‖² + δ ‖(V − V₀) N⁻¹‖²_F` with `C = Σ x xᵀ`, `K = Σ y xᵀ` has the solution
`V = V₀ + (K − V₀ C) N (S + δ I)⁻¹ N`, `S = N C N`, `δ = ridge · mean(diag S)`. `N²` (n,) says how
much the map may move in each channel, by default the same in all; nothing is divided by it. What
`x` leaves open is as in `V₀`.

Where no ridge is given, the data choose it (`evident_ridge`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectrim.linalg.psd import cholesky_damped, finite
from spectrim.tolerances import LEAST_SQUARES_RIDGE, RANK_CUTOFF_FP64

RIDGES = tuple(10 ** (-exponent / 2) for exponent in range(13))
"""What `evident_ridge` chooses from, the strongest first: 1, where the prior counts as much as the
data, down to 1e-6 in half decades."""


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
    cross: Tensor,
    C: Tensor,
    *,
    start: Tensor,
    name: str,
    ridge: float = LEAST_SQUARES_RIDGE,
    sizes: Tensor | None = None,
) -> tuple[Tensor, float]:
    """The map from x to y nearest to `start` in the sense of the module's ridge problem.

    Args:
        cross: `K = Σ y xᵀ`, (m, n).
        C: `Σ x xᵀ`, (n, n).
        start: `V₀`, (m, n); what directions without data keep.
        name: whose matrix this is, for messages.
        ridge: relative to the mean diagonal of `S`.
        sizes: `N²`, (n,), not negative; None for ones. Columns of size zero keep `V₀`.

    Returns:
        `V` (m, n) in fp64 and the relative damping that was needed.

    Raises:
        NotPositiveDefiniteError, NonFiniteError, NumericalError: see `cholesky_damped`.
    """
    start = finite(start, name=name, what="the starting map")
    residual = finite(cross, name=name, what="the cross moment") - start @ C.to(torch.float64)
    scale = start.new_ones(start.shape[1]) if sizes is None else sizes.to(start).sqrt()
    S = (scale[:, None] * scale).mul_(C)
    if not S.any():
        return start, 0.0
    L, damping = cholesky_damped(S, name=name, ridge=ridge)
    return start + torch.cholesky_solve((residual * scale).mT, L).mT * scale, damping


def evident_ridge(
    residual: Tensor, energy: float, C: Tensor, tokens: int, *, sizes: Tensor, name: str
) -> float:
    """The ridge under which the data are most likely (MacKay, Neural Computation 4, 1992).

    What `V₀` leaves is `R = Δ X + noise`, with entries of `Δ N⁻¹` and of the noise drawn
    independently. Without `Δ` and the noise's size, integrated and maximised out, twice the
    negative log-likelihood per row is, up to a constant,

        log det(I + S / δ) + T log(‖R‖² − ‖R Xᵀ N (S + δ I)^(-1/2)‖²).

    `T` would be the number of tokens if they were new. They are not: what was cut before was
    fitted to the same tokens, which reaches up to one of them per channel, and the shift that is
    left on them is smaller and more predictable than on others. So `T` is what tokens there are
    beyond the channels; where there are none the strongest ridge stands.

    Args:
        residual: `R Xᵀ`, (m, n).
        energy: `‖R‖²`.
        C: `Σ x xᵀ`, (n, n).
        tokens: behind the sums.
        sizes: `N²`, (n,).
        name: whose matrix this is, for messages.

    Returns:
        One of `RIDGES`, relative to the mean diagonal of `S`.

    Raises:
        NonFiniteError, NumericalError: `C` cannot be trusted; names whose it is.
    """
    scale = sizes.to(C).sqrt()
    S = (scale[:, None] * scale).mul_(C)
    right = (residual * scale).mT
    beyond, mean = tokens - len(S), float(S.diagonal().mean())
    if beyond <= 0 or energy <= 0 or not right.any():
        return RIDGES[0]

    def unlikeliness(ridge: float) -> float:
        L, damping = cholesky_damped(S, name=name, ridge=ridge)
        solved = torch.linalg.solve_triangular(L, right, upper=False)
        # Read together: an accelerator waits for every reading.
        numbers = torch.stack([2 * L.diagonal().log().sum(), solved.square().sum()])
        spread, explained = numbers.tolist()
        spread -= len(S) * math.log(damping * mean)
        return spread + beyond * math.log(max(energy - explained, RANK_CUTOFF_FP64 * energy))

    best, least = RIDGES[0], unlikeliness(RIDGES[0])
    for ridge in RIDGES[1:]:
        value = unlikeliness(ridge)
        if value >= least:
            break
        best, least = ridge, value
    return best
