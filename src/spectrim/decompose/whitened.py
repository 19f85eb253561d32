"""Input-aware: `min_{rank W' ≤ k} ‖(W − W') X‖²_F`, from `C = Σ x xᵀ` alone.

The objective of SVD-LLM (arXiv 2403.07378), SVD-LLM V2 (2503.12340) and of the headline rows of
AA-SVD (2604.02119, objective 2). Their Cholesky, eigenvalue and output-covariance forms share one
optimum; `B = U_k`, `A = U_kᵀ W` with `U_k` from `W C Wᵀ` reaches it without a root or an inverse,
so no jitter is needed and a singular `C` is no special case.
"""

from __future__ import annotations

from torch import Tensor

from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.directions import projected
from spectrim.decompose.statistics import statistic, weight
from spectrim.linalg.psd import shrunk
from spectrim.moments.moments import Moments, OutputMoments


def whitened(
    W: Tensor,
    moments: Moments | None = None,
    output: OutputMoments | None = None,
    *,
    name: str,
    rank: int | None = None,
    shrink_in: float = 0.0,
) -> Decomposition:
    """Ordered components by output energy, a sum over calibration tokens; `up` is orthonormal.

    Args:
        W: weight, (out, in).
        moments: must hold `C`.
        output: unused.
        name: the target, for messages.
        rank: components to hold, all by default.
        shrink_in: share of the prior in `C`; energies are then those of the shrunk moment.

    Raises:
        InputError: `C` was not collected.
        NonFiniteError: `W` or `C` is not finite.
    """
    W = weight(W, name=name)
    C = shrunk(statistic(moments, "C", W.shape[1], name=name), shrink_in, W.square().sum(0))
    return projected(W, C, name=name, rank=rank)
