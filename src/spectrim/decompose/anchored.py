"""Anchored: `min_{rank W' ≤ k} ‖W X − W' X'‖²_F`: original outputs from shifted inputs.

Objective 4 of AA-SVD (arXiv 2604.02119). With `C' = Σ x' x'ᵀ`, `D = Σ x x'ᵀ` the unconstrained
answer is the least-squares map `W_LS = W D C'⁻¹`, and rank k is `U_k U_kᵀ W_LS` with `U_k` the
leading eigenvectors of `(W D) C'⁻¹ (W D)ᵀ`. `blend` b moves the target to
`W (b x + (1 − b) x')`: 1 is anchored, 0 is shift-aware (SAES-SVD, arXiv 2602.03051, tunes it).

Differences from the authors' code: one damped Cholesky solve instead of an explicit inverse, and
the ridge pulls toward `W` instead of toward zero, so that directions which the shifted inputs
never visit keep the original weight and equal streams give back `W` exactly. Energies are the
exact decrease of the undamped objective by the factors at hand, whatever the ridge was.
"""

from __future__ import annotations

from torch import Tensor

from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.directions import checked_rank, ordered_directions
from spectrim.decompose.statistics import statistic, weight
from spectrim.errors import InputError
from spectrim.linalg.least_squares import least_squares_map
from spectrim.linalg.truncated import column_space
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.tolerances import LEAST_SQUARES_RIDGE

__all__ = ["anchored"]


def anchored(
    W: Tensor,
    moments: Moments | None = None,
    output: OutputMoments | None = None,
    *,
    name: str,
    rank: int | None = None,
    blend: float = 1.0,
    ridge: float = LEAST_SQUARES_RIDGE,
) -> Decomposition:
    """Ordered components against the original outputs, energies summed over calibration tokens.

    `irreducible` is what no linear map of the shifted inputs can reach.

    Args:
        W: weight, (out, in).
        moments: must hold `C`, `shifted` and `cross`, of the same tokens in the same order.
        output: unused.
        name: the target, for messages.
        rank: components to hold, all by default.
        blend: share of the original input in the target, 0..1.
        ridge: of the least-squares map, relative to the mean diagonal of `C'`.

    Raises:
        InputError: a moment was not collected, or `blend` is outside 0..1.
        NonFiniteError: `W` or a moment is not finite.
        NotPositiveDefiniteError: `C'` stays singular under the largest damping.
    """
    if not 0 <= blend <= 1:
        raise InputError(f"{name}: blend {blend} is outside 0..1")
    W = weight(W, name=name)
    held = checked_rank(W, rank, name=name)
    C, C_shifted, D = (
        statistic(moments, field, W.shape[1], name=name) for field in ("C", "shifted", "cross")
    )
    cross = blend * D + (1 - blend) * C_shifted
    # The target's own second moment: b² C + b (1 − b) (D + Dᵀ) + (1 − b)² C'.
    target = blend**2 * C + blend * (1 - blend) * (D + D.mT) + (1 - blend) ** 2 * C_shifted

    space = column_space(W)  # W_LS has the same column space
    reached = space.core @ cross
    best, damping = least_squares_map(reached, C_shifted, start=space.core, name=name, ridge=ridge)

    def gain(U: Tensor, A: Tensor) -> Tensor:
        return ((2 * (U.mT @ reached) - A @ C_shifted) * A).sum(1)

    mixed = best @ reached.mT
    S = mixed + mixed.mT - (best @ C_shifted) @ best.mT
    U, A, energy = ordered_directions(S, best, gain, name=name)
    total = float(((space.core @ target) * space.core).sum())
    return Decomposition(
        up=space.lift(U[:, :held]),
        down=A[:held].clone(),
        energy=energy[:held].clone(),
        total=total,
        irreducible=max(0.0, total - float(gain(U, A).sum())),
        damping=damping,
        tail=float(energy[held:].sum()),
    )
