"""The flow `learned`: gates or scores on every component, then a cut or an elastic artifact."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from spectrim.allocate.plan import Plan
from spectrim.errors import BudgetError, RecipeError
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.swap import swap_in
from spectrim.learn.acip import PruningSettings, prune
from spectrim.learn.checkpoint import Checkpoint
from spectrim.learn.gated import GatedLinear
from spectrim.learn.healing import (
    HealingSettings,
    apply_plan,
    fold_correction,
    heal,
    order_by_death,
)
from spectrim.learn.pruning import Gated
from spectrim.learn.scores import SocoSettings, SocoState
from spectrim.learn.soco import learn_scores
from spectrim.learn.survivors import RecoverySettings, choose, fixed_choice, folded, recover
from spectrim.model.weights import read_weight
from spectrim.recipe import AcipLearning, SocoLearning
from spectrim.run.identity import flat_recipe
from spectrim.run.job import Job
from spectrim.run.learned.gating import Adapters, build_gated, gates_in_place, lessons_for
from spectrim.storage.elastic import Base, Elastic

__all__ = ["learn"]


def learn(
    job: Job, *, base: Base | None = None, work: Path | None = None
) -> tuple[Plan, Elastic | None]:
    """Train on the recipe's `learn` section and cut the model at the recipe's keep, in place.

    Args:
        job: the run.
        base: names the original checkpoint; with it, ACIP returns an elastic artifact.
        work: folder for checkpoints; a run that finds one there goes on from it.

    Returns:
        The plan that was carried out, and ACIP's artifact.

    Raises:
        RecipeError: the recipe has no `learn` section.
        InputError: the work folder belongs to another run; names the differences.
        NonFiniteError: the training diverged; the last checkpoint stays.
        BudgetError: the keep lies below what the training reaches.
    """
    section = job.recipe.learn
    if isinstance(section, AcipLearning):
        return _acip(job, section, base, work)
    if isinstance(section, SocoLearning):
        return _soco(job, section, base, work), None
    raise RecipeError(f"recipe {job.recipe.name!r} has the flow 'learned' but no `learn` section")


def _acip(
    job: Job, section: AcipLearning, base: Base | None, work: Path | None
) -> tuple[Plan, Elastic | None]:
    if job.recipe.keep < section.stop_keep:
        raise BudgetError(
            f"keep {job.recipe.keep} is below stop_keep {section.stop_keep}, the smallest size "
            "that this training reaches; ask for that or more, or lower learn.stop_keep"
        )
    adapters = Adapters(section.lora_rank, section.lora_alpha, section.lora_dropout)
    gated, replay = build_gated(job, adapters=adapters)
    lessons = lessons_for(
        job,
        replay,
        batch=section.batch,
        accumulate=section.accumulate,
        teacher=section.heal_objective == "kl",
    )
    checkpoint = _checkpoint(job, base, work, section.checkpoint_every)
    healing = HealingSettings(
        steps=section.heal_steps,
        sizes=section.heal_sizes,
        objective=section.heal_objective,
        learning_rate=section.heal_learning_rate,
        final_learning_rate=section.heal_final_learning_rate,
        clip=section.clip,
        grid=section.heal_grid,
    )
    report = _Reporter(job)
    with gates_in_place(job, gated):
        with job.log.timed("prune"):
            pruned = prune(
                gated,
                lessons,
                _settings(PruningSettings, section),
                checkpoint=checkpoint,
                report=report,
            )
        order = order_by_death(gated, pruned.deaths)
        with job.log.timed("heal"):
            history = heal(
                gated, order, pruned, lessons, healing, checkpoint=checkpoint, report=report
            )
    report.close()
    job.log.network["acip"] = {
        "steps": pruned.step,
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
    plan = order.plan(job.recipe.keep)
    _cut_at(job, gated, plan, factors)
    if base is None:
        return plan, None
    return plan, Elastic(order, factors, base, "acip")


def _cut_at(job: Job, gated: Gated, plan: Plan, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Put plain layers of the plan's ranks into the model."""
    apply_plan(gated, plan)
    for name, layer in gated.layers.items():
        rank = plan[name].rank
        if rank is not None:
            up, down = factors[name]
            _put(job, name, layer, up[:, :rank], down[:rank], layer.bias)


def _put(
    job: Job, name: str, layer: GatedLinear, up: Tensor, down: Tensor, bias: Tensor | None
) -> None:
    W = read_weight(layer.original)
    small = LowRankLinear.from_factors(up, down, bias, dtype=W.dtype, device=W.device)
    swap_in(job.model, name, small)


def _soco(job: Job, section: SocoLearning, base: Base | None, work: Path | None) -> Plan:
    gated, replay = build_gated(job, adapters=Adapters(), deviation=section.deviation)
    lessons = lessons_for(
        job, replay, batch=section.batch, accumulate=section.accumulate, teacher=True
    )
    checkpoint = _checkpoint(job, base, work, section.checkpoint_every)
    settings = _settings(SocoSettings, section, keep=job.recipe.keep)
    report = _Reporter(job)
    state: SocoState | None = None
    steps = section.recover_steps
    with gates_in_place(job, gated):
        if section.parts == "rescaling":
            # All the training goes to the scores of a fixed choice.
            steps += section.explore_steps + section.oscillate_steps + section.sparsify_steps
            plan, kept = fixed_choice(gated, job.recipe.keep)
        else:
            with job.log.timed("scores"):
                state = learn_scores(gated, lessons, settings, checkpoint=checkpoint, report=report)
            plan, kept = choose(gated, state, settings)
        rescale = section.parts in ("all", "rescaling")
        recovery = RecoverySettings(
            steps=steps,
            score=section.score,
            rescale=rescale,
            learning_rate=section.recover_learning_rate,
            deviation_learning_rate=section.deviation_learning_rate,
            clip=section.clip,
            first_step=state.step if state is not None else 0,
        )
        theta = state.theta if state is not None and rescale else None
        with job.log.timed("recover"):
            scores, losses = recover(
                gated, plan, kept, theta, lessons, recovery, checkpoint=checkpoint, report=report
            )
    report.close()
    job.log.network["soco"] = {
        "steps": recovery.first_step,
        "history": state.history if state is not None else [],
        "recover": losses,
    }
    for (name, layer), part, entry in zip(gated.layers.items(), scores, plan.entries, strict=True):
        if entry.rank is not None:
            result = folded(layer, part)
            _put(job, name, layer, result.up, result.down, result.bias)
            job.log.target(name, mean_score=float(part.mean()))
    return plan


def _settings(kind: type, section: Any, **more: Any) -> Any:
    """The fields of a section that a settings class has, plus what the run knows."""
    names = {f.name for f in fields(kind)} - more.keys()
    return kind(**{name: getattr(section, name) for name in names}, **more)


def _checkpoint(job: Job, base: Base | None, work: Path | None, every: int) -> Checkpoint | None:
    """The checkpoint in a work folder; it belongs to this recipe, model and these windows."""
    if work is None:
        return None
    assert job.windows is not None
    identity = flat_recipe(job.recipe)
    identity["windows"] = job.windows.fingerprint()
    identity["model"] = "" if base is None else base.identity
    return Checkpoint(Path(work), identity, every)


class _Reporter:
    """Steps of the trainings as stages of the run's progress."""

    def __init__(self, job: Job):
        self.job = job
        self.stage = ""
        self.done = 0

    def __call__(self, stage: str, step: int, total: int, note: str) -> None:
        """Bring the stage's bar to `step`."""
        if stage != self.stage:
            self.close()
            self.stage, self.done = stage, 0
            self.job.progress.start(stage, total)
        for _ in range(self.done, min(step, total)):
            self.job.progress.advance(stage, note)
        self.done = max(self.done, step)

    def close(self) -> None:
        """End the stage."""
        if self.stage:
            self.job.progress.finish(self.stage)
        self.stage = ""
