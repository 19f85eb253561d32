"""SoCo as a run: learn scores, choose within the budget, recover, fold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from spectrim.allocate.curve import shape_curves
from spectrim.allocate.plan import Plan
from spectrim.allocate.uniform import uniform
from spectrim.learn.checkpoint import RECOVERY_FILE
from spectrim.learn.scores import SocoSettings, SocoState
from spectrim.learn.soco import learn_scores
from spectrim.learn.survivors import RecoverySettings, choose, fixed_choice, folded, recover
from spectrim.recipe import SocoLearning
from spectrim.run.job import Job
from spectrim.run.learned.gating import Adapters, build_gated, gates_in_place, lessons_for
from spectrim.run.learned.training import (
    StepReporter,
    checkpoint_of,
    put_factors,
    recomputes,
    settings_of,
)
from spectrim.run.planning import plan_limits
from spectrim.storage.elastic import Base


def learn_one_size(job: Job, section: SocoLearning, base: Base | None, work: Path | None) -> Plan:
    """Learn scores for the recipe's keep and cut the model to it, in place.

    Raises:
        InputError: the work folder belongs to another run; names the differences.
        NonFiniteError: the training diverged; the last checkpoint stays.
    """
    if job.recipe.keep == 1:
        job.log.notes.append("every target stays dense at this keep: nothing was trained")
        limits = plan_limits(job.recipe, job.dtype_bytes)
        return replace(uniform(shape_curves(job.anatomy), keep=1.0, limits=limits), rule="soco")
    gated, replay = build_gated(job, adapters=Adapters(), deviation=section.deviation)
    lessons = lessons_for(
        job, replay, batch=section.batch, accumulate=section.accumulate, teacher=True
    )
    checkpoint = checkpoint_of(job, base, work, section.checkpoint_every)
    settings = settings_of(SocoSettings, section, keep=job.recipe.keep)
    report = StepReporter(job)
    state: SocoState | None = None
    steps = section.recover_steps
    with gates_in_place(job, gated, recompute=recomputes(job, section)):
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
        again = None if checkpoint is None else replace(checkpoint, file=RECOVERY_FILE)
        theta = state.theta if state is not None and rescale else None
        with job.log.timed("recover"):
            scores, losses = recover(
                gated, plan, kept, theta, lessons, recovery, checkpoint=again, report=report
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
            put_factors(job, name, layer, result.up, result.down, result.bias)
            job.log.target(name, mean_score=float(part.mean()))
    return plan
