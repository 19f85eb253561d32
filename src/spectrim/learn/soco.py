"""SoCo: importance scores on the spectrum, learned in three phases (arXiv 2502.15092).

    W' = U (Σ ⊙ S) Vᵀ,   y' = W' x + b + d,   min over S, d of  KL(original ‖ W')

Only the scores `S = φ(θ)` and the deviation `d` are trained. No code was published; what the paper
leaves open is decided here:

explore    KL plus compression pressure, until the components with a score above the threshold fit
           the budget.
oscillate  KL always, pressure switched by hysteresis around the budget, so that components pruned
           too early can come back. Ends when a full cycle leaves the kept set as it was.
sparsify   components below the threshold fade: their part of the forward pass falls linearly to
           zero while their scores are pushed down, so that survivors take over bit by bit. What
           stays below is then held at exactly zero; ends when hardly any is undecided.
recover    the exact budget decides the last components; survivors and d are trained a little more.

Components below the threshold take no part in the forward pass (`hard`), while their gradient is
that of the score, which brings them back where they are missed. Trained without this, scores
gather just below the threshold and the model leans on them until they are pruned.

Pressure is decoupled from Adam: after its step every θ falls by `lr · min(cap, λ √(w / F))`, with w
the component's share of the cost and F the mean squared gradient of its gate in the original
model, so that what costs much and matters little goes first. Added to the loss it would be
invisible, or drown Adam's second moment. λ grows until the load follows a straight line to the
budget.

The parts can be run one by one: `selection` (scores decide, survivors stay as they were),
`rescaling` (ranks fixed in advance), `allocation` (scores decide ranks, components in order).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.learn.checkpoint import (
    Checkpoint,
    load_optimizer,
    optimizer_tensors,
    where_kept,
)
from spectrim.learn.lessons import Lessons, Report
from spectrim.learn.pruning import Gated
from spectrim.learn.rate_line import RateLine
from spectrim.learn.scores import SocoSettings, SocoState, fading, gates_of, scores_of
from spectrim.learn.surrogate import mean_square_gradients
from spectrim.refine.pace import set_pace, warmup_cosine

MEMORY = 0.98
"""Decay of the running mean of scores."""

SATURATION = 4.0
"""θ stays within ± this: beyond it the sigmoid is flat and a component could not come back."""

HURRY = 10.0
MOST_HURRY = 4.0


def deviations(gated: Gated) -> list[nn.Parameter]:
    """The trained deviations of all layers that have one."""
    return [x.deviation for x in gated.layers.values() if x.deviation is not None]


def learn_scores(
    gated: Gated,
    lessons: Lessons,
    settings: SocoSettings,
    *,
    checkpoint: Checkpoint | None = None,
    report: Report = lambda *_: None,
) -> SocoState:
    """Run the three phases; the layers are left with all components and the last gates bound.

    Raises:
        NonFiniteError: the training diverged; the last checkpoint stays.
    """
    state = SocoState.fresh(gated, settings.score)
    groups: list[dict[str, Any]] = [{"params": [state.theta], "lr": settings.learning_rate}]
    if deviations(gated):
        groups.append({"params": deviations(gated), "lr": settings.deviation_learning_rate})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
    peaks = [group["lr"] for group in optimizer.param_groups]
    if not _resume(checkpoint, gated, state, optimizer):
        state.sensitivity = mean_square_gradients(gated, lessons, steps=settings.sensitivity_steps)
    weights = gated.spans.weights(gated.costs(), gated.device)
    whole = gated.load(torch.ones_like(state.dead))
    total = settings.explore_steps + settings.oscillate_steps + settings.sparsify_steps
    line = RateLine.over(state.history)
    while state.phase != "done":
        factor = _rate(state, settings)
        set_pace(optimizer, [peak * factor for peak in peaks])
        loss = _learn(gated, lessons, settings, state, optimizer, checkpoint)
        kept_mask = scores_of(state, settings) > settings.threshold
        kept = gated.kept(kept_mask)
        _press(gated, settings, state, optimizer, weights, whole, kept_mask)
        _next_phase(settings, state, kept, kept_mask)
        if state.step % 10 == 0 or state.phase == "done":
            state.history.append([state.step, loss, kept])
            line.see(kept, loss)
            report(state.phase, state.step, total, f"keep {kept:.3f}, loss {line.text()}")
        if checkpoint is not None and (checkpoint.due(state.step) or state.phase == "done"):
            tensors = {**state.tensors(), **optimizer_tensors(optimizer, "optimizer")}
            tensors |= {f"deviation.{i}": d for i, d in enumerate(deviations(gated))}
            checkpoint.save(tensors, state.counters())
    return state


def _learn(
    gated: Gated,
    lessons: Lessons,
    settings: SocoSettings,
    state: SocoState,
    optimizer: torch.optim.Optimizer,
    checkpoint: Checkpoint | None,
) -> float:
    """One Adam step on the KL divergence; running statistics follow."""
    optimizer.zero_grad(set_to_none=True)
    loss = lessons.backward(state.step, "kl", lambda _: gated.bind(gates_of(state, settings)))
    state.step += 1
    state.phase_step += 1
    lessons.guard(math.nan, "learning_rate or pressure_cap").check(
        loss, state.step, where_kept(checkpoint)
    )
    nn.utils.clip_grad_norm_(
        [p for g in optimizer.param_groups for p in g["params"]], settings.clip
    )
    gradient = state.theta.grad
    assert gradient is not None
    before = scores_of(state, settings) > settings.threshold
    optimizer.step()
    with torch.no_grad():
        if settings.score != "relu":
            state.theta.clamp_(-SATURATION, SATURATION)
        scores = scores_of(state, settings)
        state.mean_score.mul_(MEMORY).add_(scores, alpha=1 - MEMORY)
        state.mean_square.mul_(MEMORY).add_(gradient.square(), alpha=1 - MEMORY)
        state.crossings += (before != (scores > settings.threshold)).to(torch.int32)
    return loss


@torch.no_grad()
def _press(
    gated: Gated,
    settings: SocoSettings,
    state: SocoState,
    optimizer: torch.optim.Optimizer,
    weights: Tensor,
    whole: float,
    kept: Tensor,
) -> None:
    """Decoupled pressure, and in the last phase the push towards zero."""
    rate = optimizer.param_groups[0]["lr"]
    if state.pressing:
        worth = (state.sensitivity / weights).sqrt()
        force = state.pressure * worth.median() / worth
        state.theta -= rate * force.nan_to_num(nan=0.0).clamp(max=settings.pressure_cap)
        if state.phase == "explore":
            share = min(1.0, state.phase_step / settings.explore_steps)
            lag = (gated.load(kept) - (whole + share * (settings.keep - whole))) / whole
            state.pressure *= settings.pressure_growth ** min(
                MOST_HURRY, max(0.0, 1.0 + HURRY * lag)
            )
        else:
            state.pressure *= settings.pressure_growth
    if state.phase == "sparsify":
        faded, low = fading(state, settings), ~kept
        state.theta -= rate * settings.sparsity * faded * weights.clamp(max=1.0) * low
        state.below.copy_(torch.where(low, state.below + 1, 0))
        if faded == 1.0:
            state.dead |= state.below >= settings.dead_after
        if state.phase_step % settings.dead_after == 0:
            state.used.copy_(~state.dead)
            gated.use(state.used)


def _next_phase(settings: SocoSettings, state: SocoState, kept: float, mask: Tensor) -> None:
    """Hysteresis, and the ends of phases by criterion or step limit."""
    low, high = settings.keep * (1 - settings.hysteresis), settings.keep * (1 + settings.hysteresis)
    if state.phase == "explore":
        if kept <= settings.keep or state.phase_step >= settings.explore_steps:
            state.enter("oscillate")
            state.snapshot.copy_(mask)
    elif state.phase == "oscillate":
        settled = False
        if state.pressing and kept <= low:
            state.pressing = False
        elif not state.pressing and kept > high:
            state.pressing = True
            both, either = (mask & state.snapshot).sum(), (mask | state.snapshot).sum()
            settled = bool(both > settings.settled * either)
            state.snapshot.copy_(mask)
        if settled or state.phase_step >= settings.oscillate_steps:
            state.enter("sparsify")
    elif state.phase == "sparsify":
        state.pressing = kept > settings.keep
        middle = (scores_of(state, settings) > settings.threshold / 2) & ~mask
        decided = float(middle.float().mean()) < settings.undecided
        faded = fading(state, settings) == 1.0
        if (
            decided and faded and kept <= settings.keep
        ) or state.phase_step >= settings.sparsify_steps:
            state.enter("done")


def _rate(state: SocoState, settings: SocoSettings) -> float:
    """Factor of the learning rates: warm-up, constant, a cosine to a tenth while sparsifying."""
    warm = min(1.0, (state.step + 1) / max(1, settings.warmup_steps))
    if state.phase != "sparsify":
        return warm
    return warm * warmup_cosine(state.phase_step, settings.sparsify_steps, warmup=0.0, final=0.1)


def _resume(
    checkpoint: Checkpoint | None, gated: Gated, state: SocoState, optimizer: torch.optim.Optimizer
) -> bool:
    found = checkpoint.load() if checkpoint is not None else None
    if found is None:
        return False
    tensors, counters = found
    state.restore(tensors, counters)
    with torch.no_grad():
        for i, d in enumerate(deviations(gated)):
            d.copy_(tensors[f"deviation.{i}"])
    load_optimizer(optimizer, tensors, "optimizer")
    if not bool(state.used.all()):
        gated.use(state.used)
    return True
