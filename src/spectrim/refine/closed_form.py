"""SVD-LLM's layer-wise update: re-solve the up factor on the inputs of the compressed network.

`min_B ‖W X − B A X'‖²_F` is `B = W D Aᵀ (A C' Aᵀ)⁻¹` with `C' = Σ x' x'ᵀ`, `D = Σ x x'ᵀ`. With
`D = C'` the target is `W X'`, as published (arXiv 2403.07378 v1-v4); with the cross moment it is
the original network's output. The ridge is relative to the mean diagonal of `A C' Aᵀ`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectrim.linalg.least_squares import solve_damped


def update_up(
    W: Tensor,
    down: Tensor,
    shifted: Tensor,
    *,
    name: str,
    ridge: float,
    cross: Tensor | None = None,
) -> Tensor:
    """The up factor (out, k) that is best for `down` (k, in) on the shifted inputs.

    Args:
        W: original weight, (out, in).
        down: `A`, (k, in).
        shifted: `C'`, (in, in).
        name: the target, for messages.
        ridge: relative to the mean diagonal of the normal matrix.
        cross: `D`, (in, in); None for the published target `W X'`.

    Raises:
        NotPositiveDefiniteError: the normal matrix stays singular under the largest damping.
    """
    W, down, shifted = (t.to(torch.float64) for t in (W, down, shifted))
    right = shifted if cross is None else cross.to(torch.float64)
    normal = down @ shifted @ down.mT
    moment = W @ right @ down.mT
    return solve_damped(normal, moment.mT, name=name, ridge=ridge).mT
