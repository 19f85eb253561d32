"""ACIP as a run: train the order, heal, cut at the recipe's keep, return every size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from spectrim.allocate.elastic import ElasticOrder
from spectrim.allocate.plan import Plan
from spectrim.errors import BudgetError
from spectrim.learn.acip import AcipPruning, PruningSettings, prune
from spectrim.learn.gates import DeathMap
from spectrim.learn.healing import (
    HealingSettings,
    apply_plan,
    fold_correction,
    heal,
    order_by_death,
    order_by_fisher,
)
from spectrim.learn.lessons import Lessons
from spectrim.learn.pruning import Gated
from spectrim.learn.surrogate import mean_square_gradients
from spectrim.model.recompute import is_large
from spectrim.recipe import AcipLearning
from spectrim.run.job import Job
from spectrim.run.learned.gating import Adapters, build_gated, gates_in_place, lessons_for
from spectrim.run.learned.training import (
    StepReporter,
    checkpoint_of,
    put_factors,
    recomputes,
    settings_of,
)
from spectrim.storage.elastic import Base, Elastic


def learn_every_size(
    job: Job, section: AcipLearning, base: Base | None, work: Path | None
) -> tuple[Plan, Elastic | None]:
    """Train one order of all components and cut the model at the recipe's keep, in place.

    Returns:
        The plan that was carried out, and with a base the artifact.

    Raises:
        BudgetError: the keep lies below the end of the training.
        InputError: the work folder belongs to another run; names the differences.
        NonFiniteError: the training diverged; the last checkpoint stays.
    """
    if job.recipe.keep < section.stop_keep:
        raise BudgetError(
            f"keep {job.recipe.keep} is below stop_keep {section.stop_keep}, the smallest size "
            "that this training reaches; ask for that or more, or lower learn.stop_keep"
        )
    adapters = Adapters(section.lora_rank, section.lora_alpha, section.lora_dropout)
    gated, replay = build_gated(job, adapters=adapters)
    teacher = section.heal_objective == "kl"
    sizes = {"batch": section.batch, "accumulate": section.accumulate}
    lessons = lessons_for(job, replay, teacher=teacher, **sizes)
    checkpoint = checkpoint_of(job, base, work, section.checkpoint_every)
    healing = _healing(job, section)
    report = StepReporter(job)
    told: dict[str, Any] = {"checkpoint": checkpoint, "report": report}
    with gates_in_place(job, gated, recompute=recomputes(job, section)):
        if section.order == "fisher":
            pruned, order = _fisher_order(job, gated, lessons, section)
        else:
            with job.log.timed("prune"):
                pruned = prune(gated, lessons, settings_of(PruningSettings, section), **told)
            order = order_by_death(gated, pruned.deaths)
        with job.log.timed("heal"):
            history = heal(gated, order, pruned, lessons, healing, **told)
    report.close()
    job.log.network["acip"] = {
        "steps": pruned.step,
        "order": section.order,
        "healed": healing.parts,
        "smallest_keep": order.smallest_keep,
        "prune": pruned.history,
        "heal": history,
    }
    if order.smallest_keep > job.recipe.keep:
        job.log.notes.append(
            f"pruning ended after {pruned.step} steps at keep {order.smallest_keep:.4f}, above "
            f"stop_keep {section.stop_keep}"
        )
    factors = {n: fold_correction(x.up, x.down, x.lora) for n, x in gated.layers.items()}
    # A training that ended early still gives all larger sizes: it is not thrown away.
    plan = order.plan(max(job.recipe.keep, order.smallest_keep))
    _cut_at(job, gated, plan, factors)
    if base is None:
        return plan, None
    return plan, Elastic(order, factors, base, "acip")


def _healing(job: Job, section: AcipLearning) -> HealingSettings:
    """Masters and moments of all factors are four times a bf16 model: large ones go without."""
    parts = section.heal_parts
    if parts == "auto":
        parts = "corrections" if is_large(job.model) else "factors"
    return HealingSettings(
        steps=section.heal_steps,
        parts=parts,
        sizes=section.heal_sizes,
        objective=section.heal_objective,
        learning_rate=section.heal_learning_rate,
        factor_learning_rate=section.heal_factor_learning_rate,
        final_learning_rate=section.heal_final_learning_rate,
        clip=section.clip,
        grid=section.heal_grid,
    )


def _fisher_order(
    job: Job, gated: Gated, lessons: Lessons, section: AcipLearning
) -> tuple[AcipPruning, ElasticOrder]:
    """The order of one gradient pass, and a pruning of no steps in which nothing died."""
    with job.log.timed("order"):
        squares = mean_square_gradients(gated, lessons, steps=section.order_steps)
    pruned = AcipPruning(DeathMap.fresh(squares), section.pressure, done=True)
    return pruned, order_by_fisher(gated, squares, stop_keep=section.stop_keep)


def _cut_at(job: Job, gated: Gated, plan: Plan, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Put plain layers of the plan's ranks into the model."""
    apply_plan(gated, plan)
    for name, layer in gated.layers.items():
        rank = plan[name].rank
        if rank is not None:
            up, down = factors[name]
            put_factors(job, name, layer, up[:, :rank], down[:rank], layer.bias)
