"""From learned scores to a model within its budget: choose, recover, fold.

Thresholding scores never meets a byte budget exactly. All components are therefore ordered by
their score (ties: its running mean, fewer crossings of the threshold, the mean squared gradient),
and the order is cut where the budget is. Survivors keep their scores, which a short training then
adapts to the losses at the border; at the end scores are folded into the factors, `√s` on either
side, and the deviation into the bias.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.allocate.curve import Curve
from spectrim.allocate.order import global_order, ranks_at
from spectrim.allocate.plan import Plan
from spectrim.allocate.uniform import uniform
from spectrim.learn.checkpoint import (
    Checkpoint,
    load_optimizer,
    optimizer_tensors,
    where_kept,
)
from spectrim.learn.gated import GatedLinear
from spectrim.learn.gates import GateFunction, Spans, gate_values, start_value
from spectrim.learn.lessons import Lessons, Report
from spectrim.learn.pruning import Gated
from spectrim.learn.scores import SocoSettings, SocoState, scores_of
from spectrim.learn.soco import deviations
from spectrim.refine.pace import set_pace, warmup_cosine


@dataclass(frozen=True)
class RecoverySettings:
    """How survivors are adapted.

    Attributes:
        steps: 0 leaves scores as they were learned.
        score: the score function.
        rescale: train the scores; otherwise only deviations.
        learning_rate: of θ.
        deviation_learning_rate: of d.
        clip: largest gradient norm.
        first_step: where the windows go on.
    """

    steps: int
    score: GateFunction
    rescale: bool
    learning_rate: float
    deviation_learning_rate: float
    clip: float
    first_step: int


@dataclass(frozen=True)
class Folded:
    """What a gated layer has become: `up (out, k)`, `down (k, in)`, `bias (out,)` or None."""

    up: Tensor
    down: Tensor
    bias: Tensor | None


def choose(gated: Gated, state: SocoState, settings: SocoSettings) -> tuple[Plan, list[Tensor]]:
    """The plan of the exact budget, and each target's surviving components.

    Returns:
        The plan, and int64 indices (k,) per target, empty where the target is dense.
    """
    columns = (
        scores_of(state, settings),
        state.mean_score,
        -state.crossings,
        state.mean_square,
    )
    keys = list(zip(*(gated.spans.split(c.double().cpu()) for c in columns), strict=True))
    curves = _counted(gated)
    spectral = settings.parts == "allocation"
    order = global_order(curves, importance=keys, spectral=spectral)
    plan = ranks_at(order, curves, keep=settings.keep, limits=gated.limits, repair=True)
    plan = replace(plan, rule="soco", entries=tuple(replace(e, loss=None) for e in plan.entries))
    kept = []
    for i, entry in enumerate(plan.entries):
        index = order.components(i)[: entry.rank or 0].copy()
        kept.append(torch.from_numpy(index).long())
    return plan, kept


def fixed_choice(gated: Gated, keep: float) -> tuple[Plan, list[Tensor]]:
    """The uniform plan and leading components: what rescaling alone works on."""
    plan = uniform(gated.curves, keep=keep, limits=gated.limits)
    return plan, [torch.arange(entry.rank or 0) for entry in plan.entries]


def _counted(gated: Gated) -> list[Curve]:
    """Curves with one entry per component that is there."""
    return [
        replace(curve, energy=torch.ones(size, dtype=torch.float64))
        for curve, size in zip(gated.curves, gated.spans.sizes, strict=True)
    ]


def recover(
    gated: Gated,
    plan: Plan,
    kept: list[Tensor],
    theta: Tensor | None,
    lessons: Lessons,
    settings: RecoverySettings,
    *,
    checkpoint: Checkpoint | None = None,
    report: Report = lambda *_: None,
) -> tuple[list[Tensor], list[float]]:
    """Cut the layers to their survivors and adapt these to one another.

    Where every target is dense there is nothing to adapt.

    Args:
        gated: its layers hold only the survivors afterwards; dense targets compute the original.
        plan: from `choose` or `fixed_choice`.
        kept: its components.
        theta: learned raw scores (N,), None to start at scores of one.
        lessons: windows and losses.
        settings: hyper-parameters.
        checkpoint: of the recovery, beside the one of the phases before it.
        report: told of the steps.

    Returns:
        Scores per target, (k,), and the losses of all steps.

    Raises:
        NonFiniteError: the training diverged.
    """
    scores = _cut(gated, plan, kept, theta, settings)
    groups = _groups(gated, plan, scores, settings)
    losses: list[float] = []
    guard = lessons.guard(float("nan"), "learning_rate")
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0) if groups else None
    trained, peaks = [p for g in groups for p in g["params"]], [g["lr"] for g in groups]

    def bind() -> None:
        gated.bind(gate_values(scores, settings.score) if settings.rescale else None)

    for step in range(_resume(checkpoint, trained, optimizer, losses), settings.steps):
        if optimizer is None:
            break
        factor = warmup_cosine(step, settings.steps, warmup=0.1, final=0.05)
        set_pace(optimizer, [peak * factor for peak in peaks])
        optimizer.zero_grad(set_to_none=True)
        loss = lessons.backward(settings.first_step + step, "kl", lambda _: bind())
        guard.check(loss, settings.first_step + step + 1, where_kept(checkpoint))
        nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        losses.append(loss)
        report("recover", step + 1, settings.steps, f"loss {loss:.4f}")
        if checkpoint is not None and (checkpoint.due(step + 1) or step + 1 == settings.steps):
            tensors = {f"trained.{i}": p for i, p in enumerate(trained)}
            checkpoint.save(tensors | optimizer_tensors(optimizer, "optimizer"), {"losses": losses})
    with torch.no_grad():
        bind()
        values = gate_values(scores.detach(), settings.score)
    return list(gated.spans.split(values if settings.rescale else torch.ones_like(values))), losses


def _groups(
    gated: Gated, plan: Plan, scores: Tensor, settings: RecoverySettings
) -> list[dict[str, Any]]:
    """Optimizer groups of what recovery trains; none where every target is dense."""
    groups: list[dict[str, Any]] = []
    if all(entry.rank is None for entry in plan.entries):
        return groups
    parameters: list[nn.Parameter] = deviations(gated)
    if parameters:
        groups.append({"params": parameters, "lr": settings.deviation_learning_rate})
    if settings.rescale:
        groups.append({"params": [scores], "lr": settings.learning_rate})
    return groups


@torch.no_grad()
def _resume(
    checkpoint: Checkpoint | None,
    trained: list[nn.Parameter],
    optimizer: torch.optim.Optimizer | None,
    losses: list[float],
) -> int:
    """Steps that an earlier process has done, after taking over its state."""
    found = checkpoint.load() if checkpoint is not None else None
    if found is None or optimizer is None:
        return 0
    tensors, counters = found
    for i, p in enumerate(trained):
        p.copy_(tensors[f"trained.{i}"])
    load_optimizer(optimizer, tensors, "optimizer")
    losses.extend(counters["losses"])
    return len(losses)


@torch.no_grad()
def _cut(
    gated: Gated, plan: Plan, kept: list[Tensor], theta: Tensor | None, settings: RecoverySettings
) -> nn.Parameter:
    """Layers hold their survivors; the scores of these as one new vector."""
    whole = None if theta is None else gated.spans.split(theta.detach())
    parts = []
    for i, (layer, entry) in enumerate(zip(gated.layers.values(), plan.entries, strict=True)):
        index = kept[i].to(layer.up.device)
        start = start_value(settings.score, 1.0)
        fresh = torch.full((index.numel(),), start, device=layer.up.device)
        parts.append(fresh if whole is None else whole[i][index].float())
        layer.order_components(index)
        if entry.rank is None:
            layer.rank = None
    gated.spans = Spans(tuple(part.numel() for part in parts))
    return nn.Parameter(torch.cat(parts))


@torch.no_grad()
def folded(layer: GatedLinear, scores: Tensor) -> Folded:
    """A layer's survivors with everything trained inside plain factors."""
    root = scores.clamp(min=0).sqrt()
    bias = layer.bias
    if layer.deviation is not None:
        bias = layer.deviation.clone() if bias is None else bias.float() + layer.deviation
    return Folded(layer.up * root.to(layer.up), layer.down * root.to(layer.down)[:, None], bias)
