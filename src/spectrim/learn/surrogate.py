"""The death order in one pass: mean squared gate gradients of the original model.

Adam normalizes the task gradient, so a gate dies when the pressure outgrows the root mean square of
its gradient `σ_i u_iᵀ G v_i`. Measured once on the original model, that is an empirical Fisher
score of the logarithm of each component: the cheap stand-in for ACIP's training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectrim.learn.lessons import Lessons
from spectrim.learn.pruning import Gated


def mean_square_gradients(gated: Gated, lessons: Lessons, *, steps: int) -> Tensor:
    """Mean over `steps` batches of the squared gate gradients, fp32 (N,), per unit gate.

    The layers are left with all gates open.
    """
    scores = gated.scores("straight_through", scale=1.0, dtype=torch.float32)
    total = torch.zeros_like(scores)
    for step in range(steps):
        scores.grad = None
        lessons.backward(
            step,
            "cross_entropy",
            lambda _: gated.bind_scores(scores, "straight_through", scale=1.0),
        )
        assert scores.grad is not None
        total += scores.grad.square()
    gated.bind(None)
    return (total / steps).detach()
