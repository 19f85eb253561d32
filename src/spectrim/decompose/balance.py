"""Share the singular values of a cut pair equally between its factors.

`B A` is unchanged, but both factors then carry the square roots of the product's singular values.
Training needs it: Adam is not scale-invariant, and an orthonormal `B` next to a large `A` learns at
two speeds. A balanced pair is ordered by plain singular values and is not to be cut further.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balanced(up: Tensor, down: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """`(U s^½, s^½ Vh)` of the product `up · down`, from two thin QRs and one small SVD.

    Args:
        up: `B`, (out, k).
        down: `A`, (k, in).
        rank: components to keep, the product's best by Frobenius norm; k by default, which must
            then be at most min(out, in).

    Returns:
        The pair in fp64, (out, rank) and (rank, in).

    Raises:
        ValueError: the shapes do not multiply, or the rank is larger than min(out, in) or k.
    """
    k = up.shape[1]
    kept = k if rank is None else rank
    if down.shape[0] != k or kept > min(k, up.shape[0], down.shape[1]):
        raise ValueError(
            f"cannot balance factors of shapes {tuple(up.shape)} and {tuple(down.shape)}; expected "
            "(out, k) and (k, in) with a rank of at most min(out, in)"
        )
    left, left_core = torch.linalg.qr(up.to(torch.float64))
    right, right_core = torch.linalg.qr(down.to(torch.float64).mT)
    U, s, Vh = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    root = s[:kept].sqrt()
    return (left @ U[:, :kept]) * root, root[:, None] * (Vh[:kept] @ right.mT)
