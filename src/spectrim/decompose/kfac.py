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

Both moments are shrunk toward a diagonal under which all channels are worth the same
(`linalg.psd.channel_prior`), `G` with the sizes of the rows of `W` and `C` with those of its
columns (`linalg.scaling`). That is the mean diagonal where channels are alike, and whatever factors
channels are written with cancel. Energies are those of the shrunk moments.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.directions import projected
from spectrim.decompose.statistics import statistic, tokens_of, weight
from spectrim.linalg.psd import cholesky_damped, shrunk
from spectrim.linalg.scaling import row_and_column_sizes
from spectrim.moments.moments import Moments, OutputMoments


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
        shrink_in: share of the prior in `C`.
        shrink_out: share of the prior in `G`; with 0 a singular `G` is damped instead, and the
            energies are those of the damped moment.

    Raises:
        InputError: a moment was not collected.
        NonFiniteError: `W` or a moment is not finite.
        NotPositiveDefiniteError: `G` stays singular under the largest damping.
    """
    W = weight(W, name=name)
    C = statistic(moments, "C", W.shape[1], name=name) / tokens_of(moments)
    rows, columns = row_and_column_sizes(W)
    C = shrunk(C, shrink_in, columns)
    root = output_root(output, rows, shrink_out, name=name)
    if root is None:
        # No gradient reaches this target: every answer costs nothing, the input decides.
        return projected(W, C, name=name, rank=rank, scale=0.0)
    L, damping = root
    inner = projected(L.mT @ W, C, name=name, rank=rank, scale=0.5, damping=damping)
    return replace(inner, up=torch.linalg.solve_triangular(L.mT, inner.up, upper=True))


def output_root(
    output: OutputMoments | None, sizes: Tensor, share: float, *, name: str
) -> tuple[Tensor, float] | None:
    """`L` with `L Lᵀ` the shrunk mean of `G`, and the damping it needed; None without gradients.

    Args:
        output: must hold `G`.
        sizes: of the weight's rows, squared, (out,).
        share: of the prior in `G`.
        name: the target, for messages.

    Raises:
        InputError: `G` was not collected.
        NotPositiveDefiniteError: `G` stays singular under the largest damping.
    """
    G = statistic(output, "G", len(sizes), name=name) / tokens_of(output)
    if not G.any():
        return None
    return cholesky_damped(shrunk(G, share, sizes), name=name, sizes=sizes)
