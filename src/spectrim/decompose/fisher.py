"""FWSVD (arXiv 2207.00112): `min_{rank W' ≤ k} Σ_ij f_j (W − W')²_ij`, one weight per column.

`f_j = Σ_i (∂L/∂W_ij)²` summed over windows. One weight per row or per column keeps the problem
in closed form: it is the plain truncated SVD of the scaled matrix. The paper's "row" is an input
channel (its W is in x out), hence our column; output channels are offered as `side="out"`.

Differences from published code: no root is divided by, so a channel without gradient needs no
absolute floor; gradients are fp64 sums, not fp16.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.directions import projected
from spectrim.decompose.statistics import statistic, weight
from spectrim.errors import InputError
from spectrim.moments.moments import Moments, OutputMoments


def fisher(
    W: Tensor,
    moments: Moments | None = None,
    output: OutputMoments | None = None,
    *,
    name: str,
    rank: int | None = None,
    side: Literal["in", "out"] = "in",
) -> Decomposition:
    """Ordered components by Fisher-weighted energy, in squared loss units summed over windows.

    With `side="in"` the up factor is orthonormal, with `side="out"` the down factor is.

    Args:
        W: weight, (out, in).
        moments: unused.
        output: must hold `fisher_in` (in,) or `fisher_out` (out,), as `side` says.
        name: the target, for messages.
        rank: components to hold, all by default.
        side: which channels carry the weights.

    Raises:
        InputError: the Fisher weights were not collected, or `side` is unknown.
        NonFiniteError: `W` or the weights are not finite.
    """
    W = weight(W, name=name)
    if side == "in":
        weights = statistic(output, "fisher_in", W.shape[1], name=name)
        return projected(W, weights, name=name, rank=rank)
    if side == "out":
        weights = statistic(output, "fisher_out", W.shape[0], name=name)
        turned = projected(W.mT, weights, name=name, rank=rank)
        return replace(turned, up=turned.down.mT, down=turned.up.mT)
    raise InputError(f"{name}: fisher side {side!r} is unknown; expected 'in' or 'out'")
