"""ZS-SVD in stages: truncate, correct, truncate again (arXiv 2602.02848).

Every stage surveys the model as it is, plans for the final size, and cuts. All but the last then
put the cut weights back as dense ones and move them by the correction, which is worth one backward
pass that serves all targets. Every stage starts from dense rank and has the same goal.

Differences from the authors' code: corrected weights are fp32 and decomposed from there, whatever
the model's dtype; a target that stays dense gets its original weight back (theirs keeps what was
truncated and corrected in the stage before, at the price of a dense one); the windows behind the
corrections are drawn with the recipe's seed; any allocation rule can be used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from spectrim.allocate.plan import Plan
from spectrim.devices import HOST
from spectrim.model.anatomy import Target
from spectrim.model.onload import give_back
from spectrim.model.replay import record
from spectrim.model.weights import get_module, read_weight, write_weight
from spectrim.moments.gradients_recomputed import gradients_recomputed
from spectrim.recipe import ProjectedGradientRefinement
from spectrim.refine.projected_gradient import corrected
from spectrim.run.cut.from_survey import cut_from_survey
from spectrim.run.job import Job
from spectrim.run.planning import make_plan
from spectrim.run.survey.pieces import leading
from spectrim.run.survey.survey import make_survey
from spectrim.storage.survey_file import load_factors
from spectrim.storage.survey_record import Survey


@torch.no_grad()
def cut_in_stages(
    job: Job,
    step: ProjectedGradientRefinement,
    *,
    plan: Plan | None = None,
    first: Callable[[], Survey | None] = lambda: None,
) -> Plan:
    """Compress in place with `stages - 1` corrections; returns the plan of the last stage.

    Args:
        job: the run; its model is changed.
        step: stages, and windows behind each correction.
        plan: ranks for every stage, instead of the recipe's rule at each.
        first: gives the survey of the untouched model away, for the first stage: nobody should
            hold its factors afterwards.

    Raises:
        NonFiniteError: a gradient or weight is not finite; names the target.
    """
    originals = _originals(job)
    exact: dict[str, Tensor] = {}

    def weight_of(target: Target) -> Tensor:
        return exact.get(target.name, originals[target.name]).to(job.device)

    draws = torch.Generator().manual_seed(job.recipe.seed)
    chosen, survey = plan, first()
    for stage in range(1, step.stages + 1):
        if stage > 1 or survey is None:
            survey = None  # its factors make room for those of the next one
            give_back()
            survey = make_survey(job, scores=() if plan else None, weight_of=weight_of)
        chosen = plan or make_plan(job.recipe, dtype_bytes=job.dtype_bytes, survey=survey)
        if stage == step.stages:
            break
        survey = _trimmed(survey, chosen)
        with job.log.timed("correction"):
            moved = _corrected_weights(job, step, chosen, survey, originals, draws)
        exact.clear()
        exact.update(moved)
        job.log.notes.append(_stage_note(job, stage, chosen))
    assert survey is not None and chosen is not None
    for target in job.anatomy.targets:
        if chosen[target.name].rank is None:
            _write(job, target, originals[target.name])
    job.log.notes.extend(survey.notes)
    cut_from_survey(job, chosen, survey)
    return chosen


def _originals(job: Job) -> dict[str, Tensor]:
    """Copies of all target weights, on the CPU: a card may have no room for them, (out, in)."""
    return {
        t.name: _packed(read_weight(get_module(job.model, t.name))) for t in job.anatomy.targets
    }


def _packed(weight: Tensor) -> Tensor:
    """A copy on the CPU: in 16 bits where they hold it exactly, as a checkpoint's have it."""
    for dtype in (torch.bfloat16, torch.float16):
        narrow = weight.to(HOST, dtype, copy=True)
        if torch.equal(narrow.to(weight), weight):
            return narrow
    return weight.to(HOST, copy=True)


def _write(job: Job, target: Target, weight: Tensor) -> None:
    write_weight(get_module(job.model, target.name), weight)


def _corrected_weights(
    job: Job,
    step: ProjectedGradientRefinement,
    plan: Plan,
    survey: Survey,
    originals: dict[str, Tensor],
    draws: torch.Generator,
) -> dict[str, Tensor]:
    """Cut, take the gradients there, and leave the corrected weights in the model.

    Returns:
        The fp32 weights of the corrected targets: the modules' own, or copies where those are
        narrower.
    """
    ranks = [(target, plan[target.name].rank) for target in job.anatomy.targets]
    for target, rank in ranks:
        whole = originals[target.name] if rank is None else _at_rank(job, survey, target, rank)
        _write(job, target, whole)
    give_back()
    gradients = _gradients(job, step.windows, draws)
    exact = {}
    for target, rank in ranks:
        if rank is None:
            continue
        moved = corrected(
            originals[target.name].to(job.device),
            _at_rank(job, survey, target, rank),
            [g.pop(target.name).to(job.device) for g in gradients],
            name=target.name,
        )
        _write(job, target, moved)
        held = read_weight(get_module(job.model, target.name))
        exact[target.name] = held if held.dtype == moved.dtype else moved.cpu()
    return exact


def _trimmed(survey: Survey, plan: Plan) -> Survey:
    """Without the components that a plan drops: gradients need their room."""
    if survey.factors is None:
        return survey
    kept = {e.name: e.rank for e in plan.entries if e.rank is not None}
    return replace(survey, factors={n: leading(survey.factors[n], k) for n, k in kept.items()})


def _at_rank(job: Job, survey: Survey, target: Target, rank: int) -> Tensor:
    """The survey's best approximation of a weight, fp32: made again sooner than held for all."""
    up, down = (f.to(job.device).double() for f in load_factors(survey, target.name).cut(rank))
    return (up @ down).float()


def _gradients(job: Job, windows: int, draws: torch.Generator) -> list[dict[str, Tensor]]:
    """Gradients of all targets, one set per drawn window; each window is one process's work."""
    count = job.ids.shape[0]
    rows = torch.randperm(count, generator=draws)[: min(windows, count)].tolist()
    found = [_gradient(job, row) if _mine(job, i) else _room(job) for i, row in enumerate(rows)]
    for i, sets in enumerate(found):
        job.team.broadcast_([sets[t.name] for t in job.anatomy.targets], i % job.team.size)
    return found


def _mine(job: Job, number: int) -> bool:
    return number % job.team.size == job.team.rank


def _room(job: Job) -> dict[str, Tensor]:
    return {t.name: torch.empty(t.out_features, t.in_features) for t in job.anatomy.targets}


def _gradient(job: Job, row: int) -> dict[str, Tensor]:
    """Gradients of all targets on one window, fp32, on the CPU."""
    ids, where = job.ids[row : row + 1], {"batch": 1, "device": job.device}
    # All gradients are held at once, so that no graph of all blocks should lie beside them.
    replay = record(job.model, ids, anatomy=job.anatomy, **where)
    result = gradients_recomputed(replay, job.anatomy, ids, needs={"gradient"}, **where)
    sets: dict[str, Tensor] = {}
    for name in list(result.outputs):
        gradient = result.outputs[name].gradient
        assert gradient is not None
        sets[name] = gradient.float().cpu()
        result.outputs.forget([name])
    return sets


def _stage_note(job: Job, stage: int, plan: Plan) -> str:
    dense = sum(e.rank is None for e in plan.entries)
    loss = plan.predicted_loss
    predicted = "" if loss is None else f", predicted loss change {loss:.3g}"
    return f"stage {stage}: {dense} of {len(plan.entries)} targets dense{predicted}"
