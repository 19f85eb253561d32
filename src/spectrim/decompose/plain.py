"""Plain truncated SVD: `min_{rank W' ≤ k} ‖W − W'‖²_F`, no calibration.

Energies are squared singular values. The sanity baseline: weight spectra are flat, so models
collapse early.
"""

from __future__ import annotations

from torch import Tensor

from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.directions import projected
from spectrim.decompose.statistics import weight
from spectrim.moments.moments import Moments, OutputMoments


def plain(
    W: Tensor,
    moments: Moments | None = None,
    output: OutputMoments | None = None,
    *,
    name: str,
    rank: int | None = None,
) -> Decomposition:
    """Ordered components by squared singular value; `moments` and `output` are not used.

    Args:
        W: weight, (out, in).
        moments: unused.
        output: unused.
        name: the target, for messages.
        rank: components to hold, all by default.

    Raises:
        NonFiniteError: `W` is not finite.
    """
    return projected(weight(W, name=name), None, name=name, rank=rank)
