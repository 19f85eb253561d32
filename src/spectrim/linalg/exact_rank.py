"""The rank of a matrix that has less than its smaller side, as exactly as fp64 can tell.

Nearly every weight of a trained network has full rank, which one Cholesky factorisation of the
smaller Gram matrix shows. Only where that breaks down are eigenvalues computed. Columns are scaled
to norm one first, so that the answer does not depend on the units of the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectrim.linalg.psd import finite, pivots_hold
from spectrim.tolerances import RANK_CUTOFF_FP64


def exact_rank(W: Tensor, *, name: str) -> int | None:
    """The rank of `W` (out, in) where it is less than min(out, in), else None.

    Singular values whose square is below `RANK_CUTOFF_FP64` of the largest one's count as zero:
    what rounding to fp32 leaves does, what rounding to half precision leaves does not.

    Raises:
        NonFiniteError: an entry is NaN or infinite.
    """
    W = finite(W.detach(), name=name, what="the weight")
    norms = W.norm(dim=0)
    W = W / torch.where(norms > 0, norms, 1.0)
    gram = W @ W.mT if W.shape[0] <= W.shape[1] else W.mT @ W
    L, info = torch.linalg.cholesky_ex(gram)
    if pivots_hold(L, info, gram.diagonal()):
        return None
    values = torch.linalg.eigvalsh(gram)
    found = int((values > RANK_CUTOFF_FP64 * values[-1].clamp(min=0)).sum())
    return found if found < len(values) else None
