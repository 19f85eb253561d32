"""Double-sided: `min_{rank W' ≤ k} ½ tr(Δᵀ G Δ C)`, `Δ = W − W'`, with output-gradient moments `G`.

The K-FAC approximation of the Fisher matrix of one layer (KFAC-SVD, ICML 2026; GFWSVD, arXiv
2505.17974). Inputs are whitened from the right as always, outputs from the left: with
`G = L Lᵀ` the objective is `½ ‖Lᵀ Δ C^{1/2}‖²`, so the answer is `B = L⁻ᵀ U_k`, `A = U_kᵀ Lᵀ W`
with `U_k` the leading eigenvectors of `(Lᵀ W) C (Lᵀ W)ᵀ`. It must be `Lᵀ` on the left: `L Lᵀ` and
`Lᵀ L` share their eigenvalues, but the latter weighs the wrong directions.

Unit: `G` and `C` enter as means over tokens, `Ḡ = G / tokens` and `C̄ = C / tokens`. The gradients
in `G` are those of the summed loss, and K-FAC takes the curvature of that sum to be `T · Ḡ ⊗ C̄`;
divided by the T tokens, `½ tr(Δᵀ Ḡ Δ C̄)` is the predicted increase of the mean loss per token,
in nats.

Both moments are shrunk, `M ← (1 − a) M + a · mean(diag M) · I`; energies are those of the shrunk
moments.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.directions import projected
from spectrim.decompose.statistics import statistic, tokens_of, weight
from spectrim.linalg.psd import cholesky_damped, shrunk
from spectrim.moments.moments import Moments, OutputMoments

__all__ = ["kfac"]


def kfac(
    W: Tensor,
    moments: Moments | None = None,
    output: OutputMoments | None = None,
    *,
    name: str,
    rank: int | None = None,
    shrink_in: float = 0.0,
    shrink_out: float = 0.3,
) -> Decomposition:
    """Ordered components by predicted increase of the mean loss per token, in nats.

    Args:
        W: weight, (out, in).
        moments: must hold `C`.
        output: must hold `G`, from gradients of the summed loss.
        name: the target, for messages.
        rank: components to hold, all by default.
        shrink_in: share of the identity in `C`.
        shrink_out: share of the identity in `G`; with 0 a singular `G` is damped instead, and the
            energies are those of the damped moment.

    Raises:
        InputError: a moment was not collected.
        NonFiniteError: `W` or a moment is not finite.
        NotPositiveDefiniteError: `G` stays singular under the largest damping.
    """
    W = weight(W, name=name)
    C = shrunk(statistic(moments, "C", W.shape[1], name=name), shrink_in) / tokens_of(moments)
    G = statistic(output, "G", W.shape[0], name=name)
    if not G.any():
        # No gradient reaches this target: every answer costs nothing, the input decides.
        return projected(W, C, name=name, rank=rank, scale=0.0)
    G = shrunk(G, shrink_out) / tokens_of(output)
    L, damping = cholesky_damped(G, name=name)
    inner = projected(L.mT @ W, C, name=name, rank=rank, scale=0.5, damping=damping)
    return replace(inner, up=torch.linalg.solve_triangular(L.mT, inner.up, upper=True))
