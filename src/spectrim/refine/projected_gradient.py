"""ZS-SVD's correction: the smallest step that undoes a cut's effect on the loss to first order.

With `Δ = W - W'` what a cut took away and `g = ∂L/∂W'` the gradient at the cut model, restoring
`W` would change the loss by `⟨g, Δ⟩` to first order. Of all steps with that effect the smallest is

    (⟨g, Δ⟩ / ⟨g, g⟩) g,

and with several gradients (one per window) it is the projection of `Δ` on their span,
`Σ_i a_i g_i` with `(K + ridge) a = ⟨g_i, Δ⟩`, `K_ij = ⟨g_i, g_j⟩` (arXiv 2602.02848). A step in so
few directions survives the truncation that follows it almost unharmed.

Differences from the authors' code: `corrected` measures steps column by column in units of the
column's norm in `W`, so that a function written with other channel scales gets the same correction;
the ridge is relative to the mean squared norm of the
gradients (theirs is 1e-6, which outweighs small gradients), all sums are fp64, and the result is
added to an fp32 weight (fp16 rounds such steps away).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spectrim.errors import NonFiniteError
from spectrim.linalg.least_squares import solve_damped
from spectrim.tolerances import LEAST_SQUARES_RIDGE


def minimum_norm_step(difference: Tensor, gradient: Tensor, *, name: str) -> Tensor:
    """The smallest step with the first-order effect of `difference`, fp64, of the same shape.

    Zero where the gradient is zero: nothing is known to help there.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    difference, gradient = _checked(difference, name), _checked(gradient, name)
    energy = gradient.square().sum()
    if energy == 0:
        return torch.zeros_like(difference)
    return gradient * ((gradient * difference).sum() / energy)


def span_step(
    difference: Tensor,
    gradients: Sequence[Tensor],
    *,
    name: str,
    ridge: float = LEAST_SQUARES_RIDGE,
) -> Tensor:
    """The projection of `difference` on the span of several gradients, fp64.

    Args:
        difference: `W - W'`, (out, in).
        gradients: one or more of the same shape.
        name: the target, for messages.
        ridge: as a share of the gradients' mean squared norm; gradients may be dependent.

    Raises:
        NonFiniteError: a value is NaN or infinite.
    """
    difference = _checked(difference, name)
    rows = torch.stack([_checked(g, name).flatten() for g in gradients])
    if not rows.any():
        return torch.zeros_like(difference)
    weights = solve_damped(
        rows @ rows.mT, rows @ difference.flatten()[:, None], name=name, ridge=ridge
    )
    return (weights.mT @ rows).reshape(difference.shape)


def corrected(
    W: Tensor, approximation: Tensor, gradients: Sequence[Tensor], *, name: str
) -> Tensor:
    """The cut weight moved by the correction, in fp32 or better.

    The step is the smallest relative to the columns of `W`.

    Args:
        W: original weight, (out, in).
        approximation: `W'`, the weight that the cut left.
        gradients: of the loss at the cut model; with one it is the minimum-norm step.
        name: the target, for messages.
    """
    units = W.double().norm(dim=0)
    units = torch.where(units > 0, units, 1.0)
    difference = (W.double() - approximation.double()) / units
    gradients = [g.double() * units for g in gradients]
    if len(gradients) == 1:
        step = minimum_norm_step(difference, gradients[0], name=name)
    else:
        step = span_step(difference, gradients, name=name)
    wide = torch.promote_types(W.dtype, torch.float32)
    return (approximation.double() + step * units).to(wide)


def _checked(tensor: Tensor, name: str) -> Tensor:
    if not bool(torch.isfinite(tensor).all()):
        raise NonFiniteError(f"{name}: the correction met a weight or gradient that is not finite")
    return tensor.double()
