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

from spectrim.distributed.pool import Pool
from spectrim.distributed.team import Team
from spectrim.model.losses import divergence
from spectrim.model.tail import Tail
from spectrim.refine.block import HiddenStates
from spectrim.refine.fitting import FitResult, FitSettings, fit
from spectrim.refine.masters import master_weights

__all__ = ["Teaching", "distill"]


@dataclass(frozen=True)
class Teaching:
    """What distillation sees of the two networks.

    Attributes:
        student: indices of windows (len,) -> the compressed network's hidden states after its
            last block, (len, T, d).
        teacher: the original network's hidden states there, (N, T, d).
        tail: such hidden states -> logits, (B, T, vocabulary); shared and untouched.
        train: indices of the windows to train on.
        held: indices of the windows that choose the step; empty keeps the last step.
    """

    student: Callable[[Tensor], Tensor]
    teacher: HiddenStates
    tail: Tail
    train: Tensor
    held: Tensor


def distill(
    parameters: list[nn.Parameter],
    teaching: Teaching,
    settings: FitSettings,
    *,
    device: torch.device,
    autocast: bool = False,
    on_judged: Callable[[int, float], None] = lambda step, loss: None,
    pool: Pool | None = None,
) -> FitResult:
    """Train block parameters in place so that the model's distribution approaches the original's.

    Args:
        parameters: of the compressed blocks; norm and head behind them stay untouched.
        teaching: both networks and the windows.
        settings: hyper-parameters.
        device: where to train.
        autocast: bf16 products with fp32 masters.
        on_judged: called with (step, held-out KL in nats per token).
        pool: of the hidden states, where several processes share the windows.

    Returns:
        KL in nats per token on the held-out windows, before and after.

    Raises:
        NonFiniteError: the loss diverged; the parameters are as they were.
    """
    held = teaching.held
    pool = pool or Pool(Team(), teaching.teacher.shape[0], ())

    def loss_of(rows: Tensor) -> Tensor:
        expected = teaching.teacher.read(rows, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            hidden = teaching.student(rows)
            total = teaching.tail.total(hidden, divergence(teaching.tail, expected))
        return total / (hidden.shape[0] * hidden.shape[1])

    with master_weights(parameters) as as_stored:

        @torch.no_grad()
        def judge() -> float:
            parts = [p for p in pool.here(held).split(settings.micro_batch) if len(p)]
            with as_stored():
                return pool.team.total(
                    lambda: sum(float(loss_of(rows)) * len(rows) for rows in parts)
                ) / len(held)

        return fit(
            "the whole network",
            parameters,
            loss_of,
            judge if len(held) else None,
            teaching.train,
            settings,
            tokens_per_window=teaching.teacher.shape[1],
            on_judged=on_judged,
            pool=pool,
        )
