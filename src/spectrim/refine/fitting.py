"""The one training loop of all refinements: fp32 masters, AdamW, warm-up, cosine, best state.

Whoever trains says what the loss of a batch of windows is and how a state is judged; the loop keeps
the state that was judged best, the untouched one included, so that training never leaves a model
worse than it was on what it is judged by.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectrim.errors import InputError, NonFiniteError

__all__ = ["FitResult", "FitSettings", "fit", "hold_out", "master_weights", "warmup_cosine"]


@dataclass(frozen=True)
class FitSettings:
    """How to train.

    Attributes:
        steps: optimizer steps in all.
        judge_every: steps between two judgements.
        batch: windows per step.
        learning_rate: peak.
        final_learning_rate: at the last step, as a share of the peak.
        weight_decay: AdamW's, on every parameter.
        warmup: share of the steps in which the rate grows linearly.
        clip: largest gradient norm.
        seed: of the order of the windows.
    """

    steps: int
    judge_every: int
    batch: int
    learning_rate: float
    final_learning_rate: float
    weight_decay: float
    warmup: float
    clip: float
    seed: int = 0


@dataclass
class FitResult:
    """How a training went; losses are those of the judge.

    Attributes:
        before: loss of the untouched state.
        after: loss of the kept state.
        step: the step whose state was kept, 0 for the untouched one.
        history: (step, loss) of every judgement.
        selected: False where nothing was held out and the last state was kept unseen.
        seconds: wall-clock time, judgements included.
        tokens_per_second: training tokens over seconds.
    """

    before: float
    after: float
    step: int
    history: list[tuple[int, float]] = field(default_factory=list)
    selected: bool = True
    seconds: float = 0.0
    tokens_per_second: float = 0.0


def warmup_cosine(step: int, total: int, *, warmup: float, final: float) -> float:
    """Factor of the peak learning rate at `step` (0-based) of `total`.

    Linear from zero over the first `warmup` share of the steps, then a cosine from 1 to `final`.
    """
    ramp = max(1, round(warmup * total))
    if step < ramp:
        return (step + 1) / ramp
    progress = (step - ramp) / max(1, total - ramp)
    return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def hold_out(windows: int, share: float) -> tuple[Tensor, Tensor]:
    """Indices `(train, held_out)`; the held-out windows are spread evenly over all.

    Raises:
        InputError: a share was asked for and there are fewer than two windows to split.
    """
    everything = torch.arange(windows)
    if share == 0:
        return everything, everything[:0]
    count = max(1, round(windows * share))
    if windows - count < 1:
        raise InputError(
            f"{windows} calibration window(s) cannot be split into a training and a held-out "
            "part; use more windows, or held_out: 0 to train without selection"
        )
    mask = torch.ones(windows, dtype=torch.bool)
    mask[(torch.arange(count) * windows) // count] = False
    return everything[mask], everything[~mask]


@contextmanager
def master_weights(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Hold the parameters in fp32 and trainable; cast back to their own dtypes on exit.

    bf16 parameters cannot take an Adam step of 1e-4: a weight of 0.03 would not move at all.
    """
    before = [(p.dtype, p.requires_grad) for p in parameters]
    for p in parameters:
        p.data = p.data.float()
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p, (dtype, flag) in zip(parameters, before, strict=True):
            p.grad = None
            p.data = p.data.to(dtype)
            p.requires_grad_(flag)


def _restore(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.data.copy_(value)


def _batches(train: Tensor, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled epochs without end."""
    while True:
        yield from train[torch.randperm(len(train), generator=generator)].split(batch)


def fit(
    name: str,
    parameters: list[nn.Parameter],
    loss_of: Callable[[Tensor], Tensor],
    judge: Callable[[], float] | None,
    train: Tensor,
    settings: FitSettings,
    *,
    tokens_per_window: int,
    on_judged: Callable[[int, float], None] = lambda step, loss: None,
) -> FitResult:
    """Train `parameters`, which are fp32 masters already; leave the best-judged state in them.

    Args:
        name: what is trained, for messages.
        parameters: changed in place.
        loss_of: indices of windows (len,) -> differentiable scalar loss.
        judge: loss of the current state on what is held out; None keeps the last state.
        train: indices of the windows to train on.
        settings: hyper-parameters.
        tokens_per_window: for the throughput.
        on_judged: called with (step, loss) after every judgement.

    Raises:
        NonFiniteError: a loss left the finite range; the untouched state is restored first, so
            that the caller may keep it.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    untouched = [p.detach().clone() for p in parameters]
    kept, started, seen = untouched, time.perf_counter(), 0
    before = judge() if judge is not None else math.nan
    result = FitResult(before, before, 0, [(0, before)], selected=judge is not None)
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    batches = _batches(train, settings.batch, generator)
    for step in range(settings.steps):
        chunk = next(batches)
        with torch.enable_grad():
            loss = loss_of(chunk)
            optimizer.zero_grad(set_to_none=True)
            if bool(torch.isfinite(loss)):
                loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
            _restore(parameters, untouched)
            raise NonFiniteError(
                f"refinement of {name} diverged at step {step + 1} of {settings.steps}; lower its "
                "learning_rate, or keep what there was with --on-failure keep-unrefined"
            )
        factor = warmup_cosine(
            step, settings.steps, warmup=settings.warmup, final=settings.final_learning_rate
        )
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * factor
        optimizer.step()
        seen += len(chunk) * tokens_per_window
        last = step + 1 == settings.steps
        if judge is None:
            if last:
                result.step, result.after = step + 1, float(loss.detach())
                kept = [p.detach().clone() for p in parameters]
        elif last or (step + 1) % settings.judge_every == 0:
            judged = judge()
            result.history.append((step + 1, judged))
            on_judged(step + 1, judged)
            if judged < result.after:
                result.step, result.after = step + 1, judged
                kept = [p.detach().clone() for p in parameters]
    _restore(parameters, kept)
    result.seconds = time.perf_counter() - started
    result.tokens_per_second = seen / result.seconds
    return result
