"""After pruning: fix the order of components, then tune the corrections for the sizes in use.

Published (arXiv 2502.01717): corrections are tuned at the stop size with the language-model loss.
Ours: every step draws one of the sizes from the stop to almost dense, puts the model into exactly
the state that `resize` will give it (targets that are dense there use their original weight), and
minimizes the KL divergence to the original model. A correction tuned at the stop alone has never
seen the sizes that it is used at.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from spectrim.allocate.elastic import ElasticOrder, elastic_order
from spectrim.allocate.plan import Plan
from spectrim.learn.acip import (
    AcipPruning,
    correction_tensors,
    load_corrections,
)
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
from spectrim.refine.fitting import warmup_cosine

__all__ = ["HealingSettings", "apply_plan", "fold_correction", "heal", "order_by_death"]


@dataclass(frozen=True)
class HealingSettings:
    """How to heal; the recipe section `AcipLearning` explains the fields."""

    steps: int
    sizes: Literal["stop", "sampled"]
    objective: Objective
    learning_rate: float
    final_learning_rate: float
    clip: float | None
    grid: int


def order_by_death(gated: Gated, deaths: DeathMap) -> ElasticOrder:
    """One order of all components from the death map; the layers keep theirs in that order."""
    alive = gated.spans.counts(deaths.alive).tolist()
    order, kept = elastic_order(
        gated.curves,
        deaths.keys(gated.spans),
        limits=gated.limits,
        adapters=gated.adapters,
        least=alive,
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
    """Tune the corrections; returns (step, loss, keep) of some steps.

    Raises:
        NonFiniteError: the training diverged; the last checkpoint stays.
    """
    parameters = gated.corrections()
    if not parameters or settings.steps == 0:
        return []
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    plans = _plans(order, settings)
    start, history = _resume(checkpoint, gated, optimizer)
    guard = lessons.guard(pruned.first_loss, "heal_learning_rate")
    for step in range(start, settings.steps):
        drawn = torch.randint(len(plans), (1,), generator=seeded(lessons.seed, step, 1))
        keep, plan = plans[int(drawn)]
        apply_plan(gated, plan)
        gated.draw_dropout(lessons.seed, pruned.step + step)
        optimizer.zero_grad(set_to_none=True)
        loss = lessons.backward(pruned.step + step, settings.objective, lambda: None)
        guard.check(loss, pruned.step + step + 1, where_kept(checkpoint))
        if settings.clip is not None:
            nn.utils.clip_grad_norm_(parameters, settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * warmup_cosine(
                step, settings.steps, warmup=0.02, final=settings.final_learning_rate
            )
        optimizer.step()
        if (step + 1) % max(1, settings.steps // 50) == 0:
            history.append([step + 1, loss, keep])
            report("heal", step + 1, settings.steps, f"loss {loss:.4f} at keep {keep:.3f}")
        if checkpoint is not None and checkpoint.due(step + 1):
            tensors = {f"deaths.{name}": t for name, t in asdict(pruned.deaths).items()}
            tensors |= optimizer_tensors(optimizer, "heal") | correction_tensors(gated)
            counters = {**pruned.counters(), "heal_step": step + 1, "heal_history": history}
            checkpoint.save(tensors, {"stage": "heal", **counters})
    gated.stop_dropout()
    return history


def _plans(order: ElasticOrder, settings: HealingSettings) -> list[tuple[float, Plan]]:
    """The sizes to draw from: the stop alone, or a grid from it to just below dense."""
    least = order.smallest_keep
    count = 1 if settings.sizes == "stop" else settings.grid
    keeps = [min(1.0, least + (1 - least) * i / count) for i in range(count)]
    plans = [(keep, order.plan(keep)) for keep in keeps]
    return [(k, p) for k, p in plans if any(e.rank is not None for e in p.entries)]


def _resume(
    checkpoint: Checkpoint | None, gated: Gated, optimizer: torch.optim.Optimizer
) -> tuple[int, list[list[float]]]:
    found = checkpoint.load() if checkpoint is not None else None
    if found is None or found[1]["stage"] != "heal":
        return 0, []
    tensors, counters = found
    load_corrections(gated, tensors)
    load_optimizer(optimizer, tensors, "heal")
    return counters["heal_step"], counters["heal_history"]
