"""Shift-aware: `min_{rank W' ≤ k} ‖(W − W') X'‖²_F`, from `C' = Σ x' x'ᵀ` (AA-SVD objective 3).

`X'` is what the layer sees behind the part of the network that is compressed already; the target
is the original weight on those inputs, as in Dobi-SVD (arXiv 2502.02723).
"""

from __future__ import annotations

from torch import Tensor

from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.directions import projected
from spectrim.decompose.statistics import statistic, weight
from spectrim.linalg.psd import shrunk
from spectrim.moments.moments import Moments, OutputMoments


def shifted(
    W: Tensor,
    moments: Moments | None = None,
    output: OutputMoments | None = None,
    *,
    name: str,
    rank: int | None = None,
    shrink_in: float = 0.0,
) -> Decomposition:
    """Ordered components by output energy on the shifted inputs; `up` is orthonormal.

    Args:
        W: weight, (out, in).
        moments: must hold `shifted`.
        output: unused.
        name: the target, for messages.
        rank: components to hold, all by default.
        shrink_in: share of the prior in `C'`; energies are then those of the shrunk moment.

    Raises:
        InputError: `shifted` was not collected.
        NonFiniteError: `W` or `C'` is not finite.
    """
    W = weight(W, name=name)
    C = shrunk(statistic(moments, "shifted", W.shape[1], name=name), shrink_in, W.square().sum(0))
    return projected(W, C, name=name, rank=rank)
