"""End-to-end distillation: KL from the original model's next-token distribution.

`min_θ Σ_t KL(p_t ‖ p'_t(θ))` over windows. The original's logits are not stored: its hidden states
after the last block are, and the untouched final norm and output head turn them into logits when
they are needed, so the teacher costs one stream and one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectrim.refine.block import HiddenStates
from spectrim.refine.fitting import FitResult, FitSettings, fit, master_weights

__all__ = ["distill", "kl_per_token"]


def kl_per_token(teacher: Tensor, student: Tensor) -> Tensor:
    """`KL(softmax(teacher) ‖ softmax(student))` in nats, fp32; (..., vocabulary) -> (...)."""
    log_p = F.log_softmax(teacher.float(), -1)
    log_q = F.log_softmax(student.float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def distill(
    parameters: list[nn.Parameter],
    student: Callable[[Tensor], Tensor],
    head: Callable[[Tensor], Tensor],
    ids: Tensor,
    teacher: HiddenStates,
    train: Tensor,
    held: Tensor,
    settings: FitSettings,
    *,
    device: torch.device,
    autocast: bool = False,
    on_judged: Callable[[int, float], None] = lambda step, loss: None,
) -> FitResult:
    """Train block parameters in place so that the model's distribution approaches the original's.

    Args:
        parameters: of the compressed blocks; norm and head behind them stay untouched.
        student: ids (B, T) -> logits of the compressed model.
        head: hidden states after the last block (B, T, d) -> logits, shared by both models.
        ids: windows, (N, T).
        teacher: the original's hidden states after the last block, (N, T, d).
        train: indices of the windows to train on.
        held: indices of the windows that choose the step; empty keeps the last step.
        settings: hyper-parameters.
        device: where to train.
        autocast: bf16 products with fp32 masters.
        on_judged: called with (step, held-out KL in nats per token).

    Raises:
        NonFiniteError: the loss diverged; the parameters are as they were.
    """

    def loss_of(rows: Tensor) -> Tensor:
        with torch.no_grad():
            expected = head(teacher.read(rows, device))
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            logits = student(ids[rows].to(device))
        return kl_per_token(expected, logits).mean()

    @torch.no_grad()
    def judge() -> float:
        parts = held.split(settings.batch)
        return sum(float(loss_of(rows)) * len(rows) for rows in parts) / len(held)

    with master_weights(parameters):
        return fit(
            "the whole model",
            parameters,
            loss_of,
            judge if len(held) else None,
            train,
            settings,
            tokens_per_window=ids.shape[1],
            on_judged=on_judged,
        )
