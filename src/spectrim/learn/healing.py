"""After pruning: fix the order of components, then tune what is kept for the sizes in use.

Published (arXiv 2502.01717): corrections are tuned at the stop size with the language-model loss.
Ours: every step draws one of the sizes from the stop to almost dense, puts the model into exactly
the state that `resize` will give it (targets that are dense there use their original weight), and
minimizes the KL divergence to the original model. A correction tuned at the stop alone has never
seen the sizes that it is used at.

The ordered factors themselves can be trained along, at no bytes: every step moves the prefix that
its size uses, so that the prefixes of all sizes stay good models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectrim.allocate.elastic import ElasticOrder, elastic_order
from spectrim.allocate.plan import Plan
from spectrim.learn.acip import AcipPruning
from spectrim.learn.checkpoint import (
    Checkpoint,
    load_optimizer,
    optimizer_tensors,
    where_kept,
)
from spectrim.learn.gated import Lora
from spectrim.learn.gates import DeathMap
from spectrim.learn.lessons import Lessons, Objective, Report, seeded
from spectrim.learn.pruning import Gated
from spectrim.learn.rate_line import RateLine
from spectrim.refine.pace import set_pace, warmup_cosine

WARMUP = 0.02
"""Share of the steps in which the learning rate grows."""


@dataclass(frozen=True)
class HealingSettings:
    """How to heal; the recipe section `AcipLearning` explains the fields."""

    steps: int
    parts: Literal["corrections", "factors"]
    sizes: Literal["stop", "sampled"]
    objective: Objective
    learning_rate: float
    factor_learning_rate: float
    final_learning_rate: float
    clip: float | None
    grid: int


def order_by_death(gated: Gated, deaths: DeathMap) -> ElasticOrder:
    """One order of all components from the death map; the layers keep theirs in that order."""
    alive = gated.spans.counts(deaths.alive).tolist()
    return _ordered(gated, deaths.keys(gated.spans), least=alive)


def order_by_fisher(gated: Gated, squares: Tensor, *, stop_keep: float) -> ElasticOrder:
    """One order from mean squared gate gradients (N,), per byte of a component, and its end."""
    weights = gated.spans.weights(gated.costs(), gated.device)
    keys = [(part.double(),) for part in gated.spans.split(squares / weights)]
    order = _ordered(gated, keys, least=None)
    plan = order.plan(stop_keep)
    least = [
        held if entry.rank is None else entry.rank
        for entry, held in zip(plan.entries, order.held, strict=True)
    ]
    return replace(order, least=tuple(least))


def _ordered(
    gated: Gated, keys: Sequence[Sequence[Tensor]], *, least: Sequence[int] | None
) -> ElasticOrder:
    order, kept = elastic_order(
        gated.curves, keys, limits=gated.limits, adapters=gated.adapters, least=least
    )
    for layer, index in zip(gated.layers.values(), kept, strict=True):
        layer.order_components(torch.from_numpy(index).to(layer.up.device))
    return order


def apply_plan(gated: Gated, plan: Plan) -> None:
    """Set every layer to its rank in a plan, less the adapters; dense ones to the original."""
    for (name, layer), entry in zip(gated.layers.items(), plan.entries, strict=True):
        if entry.name != name:
            raise ValueError(f"the plan has {entry.name} where the layers have {name}")
        layer.rank = None if entry.rank is None else entry.rank - gated.adapters


def fold_correction(up: Tensor, down: Tensor, lora: Lora | None) -> tuple[Tensor, Tensor]:
    """Factors with the correction as their first components: `[sE B] [F; A]`."""
    if lora is None:
        return up, down
    first = (lora.up * lora.scale).detach().to(up)
    return torch.cat([first, up], 1), torch.cat([lora.down.detach().to(down), down], 0)


def heal(
    gated: Gated,
    order: ElasticOrder,
    pruned: AcipPruning,
    lessons: Lessons,
    settings: HealingSettings,
    *,
    checkpoint: Checkpoint | None = None,
    report: Report = lambda *_: None,
) -> list[list[float]]:
    """Tune what the settings say; returns (step, loss, keep) of some steps.

    Raises:
        NonFiniteError: the training diverged; the last checkpoint stays.
    """
    plans = _plans(order, settings) if settings.steps else []
    # Without a size at which anything is cut there is nothing to train.
    groups = _trained(gated, settings) if plans else []
    if not groups:
        return []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    parameters = [p for group in groups for p in group["params"]]
    peaks = [group["lr"] for group in groups]
    start, history = _resume(checkpoint, parameters, optimizer)
    guard = lessons.guard(pruned.first_loss, "heal_learning_rate or heal_factor_learning_rate")
    line = RateLine.over(history)
    for step in range(start, settings.steps):
        drawn = torch.randint(len(plans), (1,), generator=seeded(lessons.seed, step, 1))
        keep, plan = plans[int(drawn)]
        apply_plan(gated, plan)
        factor = warmup_cosine(
            step, settings.steps, warmup=WARMUP, final=settings.final_learning_rate
        )
        set_pace(optimizer, [peak * factor for peak in peaks])
        optimizer.zero_grad(set_to_none=True)
        now = pruned.step + step
        loss = lessons.backward(
            now, settings.objective, partial(gated.draw_dropout, lessons.seed, now)
        )
        guard.check(loss, now + 1, where_kept(checkpoint))
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        history.append([step + 1, loss, keep])
        line.see(keep, loss)
        report("heal", step + 1, settings.steps, f"keep {keep:.3f}, loss {line.text()}")
        if checkpoint is not None and checkpoint.due(step + 1):
            tensors = {f"deaths.{name}": t for name, t in asdict(pruned.deaths).items()}
            tensors |= optimizer_tensors(optimizer, "heal")
            tensors |= {f"healed.{i}": p for i, p in enumerate(parameters)}
            counters = {**pruned.counters(), "heal_step": step + 1, "heal_history": history}
            checkpoint.save(tensors, {"stage": "heal", **counters})
    gated.stop_dropout()
    if settings.parts == "factors":
        for layer in gated.layers.values():
            layer.settle_factors()
    return history


def _trained(gated: Gated, settings: HealingSettings) -> list[dict[str, Any]]:
    """Optimizer groups of what healing trains, all in fp32."""
    groups: list[dict[str, Any]] = []
    if gated.corrections():
        groups.append({"params": gated.corrections(), "lr": settings.learning_rate})
    if settings.parts == "factors":
        factors = [p for layer in gated.layers.values() for p in layer.train_factors()]
        groups.append({"params": factors, "lr": settings.factor_learning_rate})
    return groups


def _plans(order: ElasticOrder, settings: HealingSettings) -> list[tuple[float, Plan]]:
    """The sizes to draw from: the stop alone, or a grid from it to just below dense."""
    least = order.smallest_keep
    count = 1 if settings.sizes == "stop" else settings.grid
    keeps = [min(1.0, least + (1 - least) * i / count) for i in range(count)]
    plans = [(keep, order.plan(keep)) for keep in keeps]
    return [(k, p) for k, p in plans if any(e.rank is not None for e in p.entries)]


@torch.no_grad()
def _resume(
    checkpoint: Checkpoint | None, parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, list[list[float]]]:
    found = checkpoint.load() if checkpoint is not None else None
    if found is None or found[1]["stage"] != "heal":
        return 0, []
    tensors, counters = found
    for i, p in enumerate(parameters):
        p.copy_(tensors[f"healed.{i}"])
    load_optimizer(optimizer, tensors, "heal")
    return counters["heal_step"], counters["heal_history"]
