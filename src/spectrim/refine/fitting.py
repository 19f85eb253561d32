"""The one training loop of all refinements: AdamW, warm-up, cosine, the best state is kept.

Whoever trains says what the loss of a batch of windows is and which windows judge a state; the loop
keeps the state that was judged best, the untouched one included, so that training never leaves a
model worse than it was on what it is judged by. Several processes share every batch: each adds the
gradients of its windows, and all of them take the same step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from spectrim.distributed.pool import Pool
from spectrim.distributed.team import Team
from spectrim.errors import NonFiniteError
from spectrim.refine.adamw import AdamW
from spectrim.refine.course import Course
from spectrim.refine.pace import warmup_cosine

LossOf = Callable[[Tensor], Tensor]
"""Indices of windows (len,) -> differentiable scalar, the mean over these windows."""


@dataclass(frozen=True)
class FitSettings:
    """How to train.

    Attributes:
        steps: optimizer steps in all.
        judge_every: steps between two judgements.
        batch: windows per step.
        micro_batch: windows per forward pass; gradients of a step add up over several.
        learning_rate: peak.
        final_learning_rate: at the last step, as a share of the peak.
        weight_decay: AdamW's, on every parameter.
        warmup: share of the steps in which the rate grows linearly.
        clip: largest gradient norm.
        seed: of the order of the windows.
        relative: learning rates are shares of each tensor's root mean square. Entries of a factor
            shrink as layers grow, so one share fits models of all widths and one step does not.
        patience: judgements in a row without a better state after which training ends; None
            takes all steps.
    """

    steps: int
    judge_every: int
    batch: int
    micro_batch: int
    learning_rate: float
    final_learning_rate: float
    weight_decay: float
    warmup: float
    clip: float
    seed: int = 0
    relative: bool = False
    patience: int | None = None


@dataclass
class FitResult:
    """How a training went.

    Attributes:
        before: judged loss of the untouched state; of the first batch where nothing was held out.
        after: judged loss of the kept state; of the last batch where nothing was held out.
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


def _units(parameters: list[nn.Parameter], relative: bool) -> list[float]:
    """What a learning rate of one means for each tensor."""
    if not relative:
        return [1.0] * len(parameters)
    sizes = torch.stack([p.detach().square().mean().sqrt() for p in parameters]).tolist()
    # A tensor of zeros has no size of its own, and moves as carefully as the smallest one.
    smallest = min((size for size in sizes if size > 0), default=1.0)
    return [size or smallest for size in sizes]


def _copies(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def _restore(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.data.copy_(value)


def _batches(train: Tensor, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled epochs without end."""
    while True:
        yield from train[torch.randperm(len(train), generator=generator)].split(batch)


def _finite(loss: Tensor | float, what: str) -> float:
    value = float(loss)
    if not math.isfinite(value):
        raise NonFiniteError(f"{what} is {value}")
    return value


def _judged(loss_of: LossOf, course: Course, micro_batch: int) -> float:
    """Mean loss of the held-out windows as things are, the same on all processes."""
    held, team = course.held, course.pool.team
    parts = [rows for rows in course.pool.here(held).split(micro_batch) if len(rows)]

    def loss_here() -> float:
        # Read at the end: an accelerator waits for every reading.
        losses = torch.stack([loss_of(rows) for rows in parts]).tolist() if parts else []
        return sum(loss * len(rows) for loss, rows in zip(losses, parts, strict=True))

    with torch.no_grad():
        total = team.total(loss_here)
    return _finite(total / len(held), "the held-out loss")


def _gradients(
    parameters: list[nn.Parameter],
    loss_of: LossOf,
    chunk: Tensor,
    settings: FitSettings,
    pool: Pool,
) -> float:
    """Leave the clipped gradient of the batch's mean loss in the parameters; returns the loss."""
    for p in parameters:
        p.grad = None
    mine = pool.spread(chunk)

    def loss_here() -> float:
        total: Tensor | float = 0.0
        for rows in mine.split(settings.micro_batch) if len(mine) else ():
            with torch.enable_grad():
                loss = loss_of(rows) * (len(rows) / len(chunk))
                loss.backward()
            total = total + loss.detach()
        return _finite(total, "the loss")

    total = pool.team.total(loss_here)
    _add_gradients(parameters, pool.team)
    norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
    _finite(norm, "the gradient's norm")
    return total


def _add_gradients(parameters: list[nn.Parameter], team: Team) -> None:
    """Sum the gradients of all processes; a parameter that none of them reached stays without."""
    if team.size == 1:
        return
    reached = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int64)
    team.sum_([reached])
    for p, ranks in zip(parameters, reached.tolist(), strict=True):
        if ranks and p.grad is None:
            p.grad = torch.zeros_like(p)
    team.sum_([p.grad for p in parameters if p.grad is not None])


def fit(
    name: str,
    parameters: list[nn.Parameter],
    loss_of: LossOf,
    course: Course,
    settings: FitSettings,
    *,
    judging: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> FitResult:
    """Train `parameters`, which are fp32 masters already; leave the best-judged state in them.

    Args:
        name: what is trained, for messages.
        parameters: changed in place.
        loss_of: what is to become small.
        course: windows, and who is told.
        settings: hyper-parameters.
        judging: a context in which parameters and layers are as they will be used.

    Raises:
        NonFiniteError: a loss left the finite range; the untouched state is restored first, so
            that the caller may keep it.
    """
    untouched = _copies(parameters)
    progress = _Progress(name, settings.steps)
    try:
        result, kept = _train(parameters, loss_of, course, settings, judging, progress)
    except NonFiniteError as error:
        _restore(parameters, untouched)
        raise NonFiniteError(f"{progress}: {error}") from error
    _restore(parameters, kept)
    # The same gradients gave all processes the same values; should a device round otherwise, this
    # keeps the difference from growing.
    course.pool.team.broadcast_([p.data for p in parameters], 0)
    result.seconds = time.perf_counter() - progress.started
    result.tokens_per_second = progress.windows * course.tokens / result.seconds
    return result


@dataclass
class _Progress:
    """How far a training is, as the message of its failure."""

    name: str
    steps: int
    step: int = 0
    windows: int = 0
    started: float = field(default_factory=time.perf_counter)

    def __str__(self) -> str:
        if self.step == 0:
            return f"{self.name} cannot be refined, it is broken before its training"
        return (
            f"refinement of {self.name} diverged at step {self.step} of {self.steps}; lower its "
            "learning_rate, or keep what there was with --on-failure keep-unrefined"
        )


def _train(
    parameters: list[nn.Parameter],
    loss_of: LossOf,
    course: Course,
    settings: FitSettings,
    judging: Callable[[], AbstractContextManager[None]],
    progress: _Progress,
) -> tuple[FitResult, list[Tensor]]:
    """The loop itself; returns the result and the values to keep."""

    def judge() -> float:
        with judging():
            return _judged(loss_of, course, settings.micro_batch)

    selects = len(course.held) > 0
    before = judge() if selects else math.nan
    kept = _copies(parameters)
    result = FitResult(before, before, 0, [], selected=selects)
    if selects:
        result.history.append((0, before))
    units = _units(parameters, settings.relative)
    optimizer = AdamW(parameters, weight_decay=settings.weight_decay)
    worse = 0
    batches = _batches(course.train, settings.batch, torch.Generator().manual_seed(settings.seed))
    for step in range(1, settings.steps + 1):
        chunk = next(batches)
        progress.step, progress.windows = step, progress.windows + len(chunk)
        loss = _gradients(parameters, loss_of, chunk, settings, course.pool)
        factor = warmup_cosine(
            step - 1, settings.steps, warmup=settings.warmup, final=settings.final_learning_rate
        )
        optimizer.step([settings.learning_rate * factor * unit for unit in units])
        last = step == settings.steps
        if not selects:
            result.before = loss if step == 1 else result.before
            if last:
                result.step, result.after, kept = step, loss, _copies(parameters)
        elif last or step % settings.judge_every == 0:
            judged = judge()
            result.history.append((step, judged))
            course.on_judged(step, judged)
            if judged < result.after:
                result.step, result.after, kept = step, judged, _copies(parameters)
                worse = 0
            else:
                worse += 1
            if settings.patience is not None and worse >= settings.patience:
                break
    return result, kept
