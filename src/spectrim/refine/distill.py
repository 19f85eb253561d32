"""End-to-end distillation: KL from the original model's next-token distribution.

`min_θ Σ_t KL(p_t ‖ p'_t(θ))` over windows. The original's logits are not stored: its hidden states
after the last block are, and the untouched final norm and output head turn them into logits when
they are needed, so the teacher costs one stream and one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.devices import on_host
from spectrim.model.losses import divergence
from spectrim.model.tail import Tail
from spectrim.refine.block import HiddenStates
from spectrim.refine.course import Course
from spectrim.refine.fitting import FitResult, FitSettings, fit
from spectrim.refine.masters import master_weights


@dataclass(frozen=True)
class Teaching:
    """What distillation sees of the two networks.

    Attributes:
        student: indices of windows (len,) -> the compressed network's hidden states after its
            last block, (len, T, d).
        teacher: the original network's hidden states there, (N, T, d).
        tail: such hidden states -> logits, (B, T, vocabulary); shared and untouched.
    """

    student: Callable[[Tensor], Tensor]
    teacher: HiddenStates
    tail: Tail


def distill(
    parameters: list[nn.Parameter],
    teaching: Teaching,
    course: Course,
    settings: FitSettings,
    *,
    device: torch.device,
) -> FitResult:
    """Train block parameters in place so that the model's distribution approaches the original's.

    Where the device is no host, products are in bf16 beside fp32 master weights.

    Args:
        parameters: of the compressed blocks; norm and head behind them stay untouched.
        teaching: both networks.
        course: the windows; judged is the KL in nats per token.
        settings: hyper-parameters.
        device: where to train.

    Returns:
        KL in nats per token on the held-out windows, before and after.

    Raises:
        NonFiniteError: the loss diverged; the parameters are as they were.
    """

    def loss_of(rows: Tensor) -> Tensor:
        expected = teaching.teacher.read(rows, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=not on_host(device)):
            hidden = teaching.student(rows)
            total = teaching.tail.total(hidden, divergence(teaching.tail, expected))
        return total / (hidden.shape[0] * hidden.shape[1])

    with master_weights(parameters) as as_stored:
        name = "the whole network"
        return fit(name, parameters, loss_of, course, settings, judging=as_stored)
