"""ACIP: one training whose order of gate deaths answers every size (arXiv 2502.01717).

    min over μ, LoRA of  CE(W' = Σ_i q(μ_i) u_i a_i + s E F) + λ_t Σ_i w_i relu(μ_i)

Gates are straight-through (forward 0 or 1), start at c, and are absorbing at zero. λ grows by a
factor every few steps, as published, or follows a path: it grows faster while the kept share lags
behind a straight line to the stop, and rests while it is ahead, so that the length of a run is
known before it starts. Training stops when the bytes, LoRA included, reach `stop_keep`.

Differences from the authors' code, all options: gates and moments in fp32 (theirs are bf16, in
which steps of 5e-5 round away), penalties in proportion to the bytes that a component costs, any
basis of components, ties broken, LoRA counted. λ advances per optimizer step, not per micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectrim.learn.checkpoint import (
    Checkpoint,
    load_optimizer,
    optimizer_tensors,
    where_kept,
)
from spectrim.learn.gates import DeathMap
from spectrim.learn.lessons import Lessons, Report
from spectrim.learn.pruning import Gated
from spectrim.learn.rate_line import RateLine

COMPACT_EVERY = 25
"""Steps between two removals of dead components from the products."""

START_SHARE = 0.1
"""λ starts at this share of the median gate gradient where it follows a path."""

HURRY = 10.0
"""How many more growth steps λ takes per unit of lag, relative to the load at the start."""

MOST_HURRY = 4.0


@dataclass(frozen=True)
class PruningSettings:
    """How to prune; the recipe section `AcipLearning` explains the fields."""

    stop_keep: float
    gate_scale: float
    gate_dtype: Literal["float32", "bfloat16"]
    learning_rate: float
    lora_learning_rate: float
    clip: float | None
    pressure: float
    pressure_growth: float
    pressure_every: int
    steps: int | None
    max_steps: int
    weigh_by_cost: bool
    size_every: int


@dataclass
class AcipPruning:
    """The state of the pruning phase, and its result.

    Attributes:
        deaths: when every gate died.
        pressure: λ.
        step: optimizer steps done.
        first_loss: of step 1.
        done: whether the stop was reached, or the last step.
        history: (step, loss, kept share) at every size check.
    """

    deaths: DeathMap
    pressure: float
    step: int = 0
    first_loss: float = math.nan
    done: bool = False
    history: list[list[float]] = field(default_factory=list)

    def counters(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        names = ("pressure", "step", "first_loss", "done", "history")
        return {name: getattr(self, name) for name in names}


def prune(
    gated: Gated,
    lessons: Lessons,
    settings: PruningSettings,
    *,
    checkpoint: Checkpoint | None = None,
    report: Report = lambda *_: None,
) -> AcipPruning:
    """Train gates and corrections until the stop; layers are left with all components bound.

    Raises:
        NonFiniteError: the training diverged; the last checkpoint stays.
    """
    scores = gated.scores(
        "straight_through",
        scale=settings.gate_scale,
        dtype=getattr(torch, settings.gate_dtype),
    )
    state = AcipPruning(DeathMap.fresh(scores), settings.pressure)
    groups: list[dict[str, Any]] = [{"params": [scores], "lr": settings.learning_rate}]
    if gated.corrections():
        groups.append({"params": gated.corrections(), "lr": settings.lora_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    _resume(checkpoint, gated, scores, optimizer, state)
    gated.use(_compacted(state))
    costs = gated.costs() if settings.weigh_by_cost else [1.0] * len(gated.curves)
    weights = gated.spans.weights(costs, gated.device)
    total = settings.steps or settings.max_steps
    whole = gated.load(torch.ones_like(state.deaths.alive))
    line = RateLine.over(state.history)
    while not state.done:
        loss = _step(gated, lessons, settings, scores, optimizer, state, weights, checkpoint)
        checked = state.step % settings.size_every == 0
        if checked or state.step >= settings.max_steps:
            kept = gated.kept(state.deaths.alive)
            state.history.append([state.step, loss, kept])
            state.done = kept <= settings.stop_keep or state.step >= settings.max_steps
            line.see(kept, loss)
            report("prune", state.step, total, f"keep {kept:.3f}, loss {line.text()}")
        _raise_pressure(gated, settings, state, whole)
        if state.step % COMPACT_EVERY == 0:
            gated.use(state.deaths.alive)
        if checkpoint is not None and (checkpoint.due(state.step) or state.done):
            save_pruning(checkpoint, gated, scores, optimizer, state)
    gated.stop_dropout()
    gated.use(None)
    gated.bind(state.deaths.alive.float())
    return state


def _step(
    gated: Gated,
    lessons: Lessons,
    settings: PruningSettings,
    scores: nn.Parameter,
    optimizer: torch.optim.Optimizer,
    state: AcipPruning,
    weights: Tensor,
    checkpoint: Checkpoint | None,
) -> float:
    """One optimizer step; deaths are recorded right after it."""
    optimizer.zero_grad(set_to_none=True)

    def prepare(turn: int) -> None:
        gated.draw_dropout(lessons.seed, state.step, turn)
        gated.bind_scores(scores, "straight_through", scale=settings.gate_scale)

    loss = lessons.backward(state.step, "cross_entropy", prepare)
    state.step += 1
    if state.step == 1:
        state.first_loss = loss
    guard = lessons.guard(state.first_loss, "learning_rate, lora_learning_rate or pressure_growth")
    guard.check(loss, state.step, where_kept(checkpoint))
    assert scores.grad is not None
    state.deaths.watch(scores.grad)
    if state.step == 1 and settings.steps is not None:
        state.pressure = START_SHARE * float(scores.grad.float().abs().median())
    if settings.clip is not None and gated.corrections():
        nn.utils.clip_grad_norm_(gated.corrections(), settings.clip)
    # The penalty's gradient is written down, not differentiated: λ w_i on living gates.
    scores.grad += (state.pressure * weights * state.deaths.alive).to(scores.dtype)
    optimizer.step()
    state.deaths.record(scores.data, state.step)
    return loss


def _raise_pressure(
    gated: Gated, settings: PruningSettings, state: AcipPruning, whole: float
) -> None:
    """λ for the next step."""
    if state.step % settings.pressure_every:
        return
    if settings.steps is None:
        state.pressure *= settings.pressure_growth
        return
    share = min(1.0, state.step / settings.steps)
    wanted = whole + share * (settings.stop_keep - whole)
    lag = (gated.load(state.deaths.alive) - wanted) / whole
    pace = min(MOST_HURRY, max(0.0, 1.0 + HURRY * lag))
    state.pressure *= settings.pressure_growth**pace


def _compacted(state: AcipPruning) -> Tensor:
    """What was alive at the last removal from the products: it does not depend on resuming."""
    last = state.step - state.step % COMPACT_EVERY
    return state.deaths.alive | (state.deaths.died > last)


def save_pruning(
    checkpoint: Checkpoint,
    gated: Gated,
    scores: Tensor,
    optimizer: torch.optim.Optimizer,
    state: AcipPruning,
) -> None:
    """Everything that `prune` needs to go on."""
    tensors = {"scores": scores, **optimizer_tensors(optimizer, "optimizer")}
    tensors |= {f"deaths.{name}": t for name, t in asdict(state.deaths).items()}
    tensors |= correction_tensors(gated)
    checkpoint.save(tensors, {"stage": "prune", **state.counters()})


def correction_tensors(gated: Gated) -> dict[str, Tensor]:
    """All LoRA parameters by number."""
    return {f"lora.{i}": p for i, p in enumerate(gated.corrections())}


@torch.no_grad()
def load_corrections(gated: Gated, tensors: dict[str, Tensor]) -> None:
    """The inverse of `correction_tensors`."""
    for i, p in enumerate(gated.corrections()):
        p.copy_(tensors[f"lora.{i}"])


@torch.no_grad()
def _resume(
    checkpoint: Checkpoint | None,
    gated: Gated,
    scores: nn.Parameter,
    optimizer: torch.optim.Optimizer,
    state: AcipPruning,
) -> None:
    found = checkpoint.load() if checkpoint is not None else None
    if found is None:
        return
    tensors, counters = found
    for name in ("died", "value", "mean_square"):
        getattr(state.deaths, name).copy_(tensors[f"deaths.{name}"])
    for name in state.counters():
        setattr(state, name, counters[name])
    # What healing has made of the corrections since then, it finds itself.
    if counters["stage"] == "prune":
        load_corrections(gated, tensors)
        scores.copy_(tensors["scores"])
        load_optimizer(optimizer, tensors, "optimizer")
