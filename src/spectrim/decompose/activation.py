"""ASVD: `min_{rank W' ≤ k} ‖(W − W') diag(s)‖²_F` with `s_j = (mean |x_j|)^α` (arXiv 2312.05821).

Differences from the authors' code: an exact decomposition instead of a randomized one without
oversampling, and no absolute floor under `s`, because nothing is divided by it: a dead channel
has weight zero and its column of `W` is kept as far as the rank allows.
"""

from __future__ import annotations

from torch import Tensor

from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.directions import projected
from spectrim.decompose.statistics import statistic, tokens_of, weight
from spectrim.errors import InputError
from spectrim.moments.moments import Moments, OutputMoments


def activation(
    W: Tensor,
    moments: Moments | None = None,
    output: OutputMoments | None = None,
    *,
    name: str,
    rank: int | None = None,
    alpha: float = 0.5,
) -> Decomposition:
    """Ordered components of the column-scaled weight.

    Args:
        W: weight, (out, in).
        moments: must hold `absolute`.
        output: unused.
        name: the target, for messages.
        rank: components to hold, all by default.
        alpha: exponent of the mean magnitude; 0 is the plain SVD.

    Raises:
        InputError: `absolute` was not collected, or `alpha` is negative.
        NonFiniteError: `W` or the magnitudes are not finite.
    """
    if alpha < 0:
        raise InputError(f"{name}: alpha {alpha} is negative; expected 0 or more")
    W = weight(W, name=name)
    mean = statistic(moments, "absolute", W.shape[1], name=name) / tokens_of(moments)
    return projected(W, mean.pow(2 * alpha), name=name, rank=rank)
