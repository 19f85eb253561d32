"""Block refinement: train one compressed block to reproduce the original block's output.

`min_θ ‖block(X) − block'(X'; θ)‖²` with the original block on the original stream X as the target
and the compressed block on the shifted stream X' as the prediction; θ are all factors, norms and
biases of the block (AA-SVD, arXiv 2604.02119, stage 2). Differences from the authors' code: fp32
master weights and an fp32 loss, and a held-out part of the windows chooses the epoch, epoch zero
included, so that refinement never makes a block worse on windows that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from spectrim.devices import on_host
from spectrim.distributed.pool import Pool
from spectrim.layers.quantized import trained_scales
from spectrim.refine.course import Course, hold_out
from spectrim.refine.fitting import FitResult, FitSettings, fit
from spectrim.refine.masters import master_weights


class HiddenStates(Protocol):
    """What refinement needs of a stream: the windows at some indices, on the training device."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N windows, T tokens, d width)."""
        ...

    def read(self, rows: Tensor, device: torch.device) -> Tensor:
        """The windows at `rows`, (len, T, d)."""
        ...


Run = Callable[[Tensor], Tensor]
"""Hidden states into the block (B, T, d) -> hidden states out of it."""


@dataclass(frozen=True)
class BlockTraining:
    """Hyper-parameters of one block's training; defaults are the paper's.

    `micro_batch` is no hyper-parameter: it bounds the windows per forward pass, and gradients of
    a step add up.
    """

    epochs: int = 25
    batch: int = 32
    micro_batch: int = 32
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    final_learning_rate: float = 0.1
    clip: float = 1.0
    held_out: float = 0.0625
    relative: bool = False
    seed: int = 0

    def settings(self, windows: int) -> FitSettings:
        """For a number of training windows."""
        per_epoch = -(-windows // self.batch)
        return FitSettings(
            steps=self.epochs * per_epoch,
            judge_every=per_epoch,
            batch=self.batch,
            micro_batch=self.micro_batch,
            learning_rate=self.learning_rate,
            final_learning_rate=self.final_learning_rate,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            clip=self.clip,
            relative=self.relative,
            seed=self.seed,
        )


def refine_block(
    name: str,
    module: nn.Module,
    run: Run,
    pool: Pool,
    training: BlockTraining,
    *,
    device: torch.device,
    on_judged: Callable[[int, float], None] = lambda step, loss: None,
) -> FitResult:
    """Train `module` in place so that `run(inputs)` approaches `targets`; keep the best epoch.

    Where the device is no host, products are in bf16 beside fp32 master weights.

    Args:
        name: the block's path, for messages.
        module: the compressed block; every parameter is trained, and the scales of integers.
        run: runs it with its recorded arguments (and through further blocks for look-ahead).
        pool: of two `HiddenStates` (N, T, d): the shifted stream at the block, and the original
            stream after it (or after the look-ahead).
        training: hyper-parameters.
        device: where to train.
        on_judged: called with (step, held-out loss) after every epoch.

    Returns:
        Mean squared errors per element of the held-out windows, before and after.

    Raises:
        NonFiniteError: the loss diverged; the block is back in its unrefined state.
        InputError: too few windows for the held-out share.
    """
    inputs, targets = pool.states
    windows, tokens, _ = inputs.shape
    train, held = hold_out(windows, training.held_out)
    course = Course(train, held, tokens, on_judged, pool)
    with ExitStack() as stack:
        stack.enter_context(trained_scales([module]))
        parameters = list(module.parameters())
        as_stored = stack.enter_context(master_weights(parameters))
        # The dtype of the masters: fp32, or fp64 for a model in fp64.
        wide = parameters[0].dtype

        def loss_of(rows: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=not on_host(device)):
                prediction = run(inputs.read(rows, device).to(wide))
            return (prediction.to(wide) - targets.read(rows, device).to(wide)).square().mean()

        settings = training.settings(len(train))
        return fit(name, parameters, loss_of, course, settings, judging=as_stored)
