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

import torch
from torch import Tensor

from spectrim.allocate.plan import Plan
from spectrim.devices import HOST
from spectrim.model.anatomy import Target
from spectrim.model.weights import get_module, read_weight, write_weight
from spectrim.moments.gradients import gradient_pass
from spectrim.recipe import ProjectedGradientRefinement
from spectrim.refine.projected_gradient import corrected
from spectrim.run.cut.from_survey import cut_from_survey
from spectrim.run.job import Job
from spectrim.run.planning import make_plan
from spectrim.run.survey.survey import make_survey
from spectrim.storage.survey_file import load_factors
from spectrim.storage.survey_record import Survey


@torch.no_grad()
def cut_in_stages(
    job: Job,
    step: ProjectedGradientRefinement,
    *,
    plan: Plan | None = None,
    survey: Survey | None = None,
) -> Plan:
    """Compress in place with `stages - 1` corrections; returns the plan of the last stage.

    Args:
        job: the run; its model is changed.
        step: stages, and windows behind each correction.
        plan: ranks for every stage, instead of the recipe's rule at each.
        survey: of the untouched model, for the first stage.

    Raises:
        NonFiniteError: a gradient or weight is not finite; names the target.
    """
    originals = _originals(job)
    exact: dict[str, Tensor] = {}

    def weight_of(target: Target) -> Tensor:
        return exact.get(target.name, originals[target.name]).to(job.device)

    draws = torch.Generator().manual_seed(job.recipe.seed)
    chosen = plan
    for stage in range(1, step.stages + 1):
        if stage > 1 or survey is None:
            survey = make_survey(job, scores=() if plan else None, weight_of=weight_of)
        chosen = plan or make_plan(job.recipe, dtype_bytes=job.dtype_bytes, survey=survey)
        if stage == step.stages:
            break
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
        t.name: read_weight(get_module(job.model, t.name)).to(HOST, copy=True)
        for t in job.anatomy.targets
    }


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
        The fp32 weights of the corrected targets, which the modules hold in the model's dtype.
    """
    approximations: dict[str, Tensor] = {}
    for target in job.anatomy.targets:
        rank = plan[target.name].rank
        if rank is None:
            _write(job, target, originals[target.name])
            continue
        up, down = (f.to(job.device).double() for f in load_factors(survey, target.name).cut(rank))
        approximation = (up @ down).float()
        _write(job, target, approximation)
        approximations[target.name] = approximation.cpu()
    gradients = _gradients(job, step.windows, draws)
    exact = {}
    for target in job.anatomy.targets:
        if target.name not in approximations:
            continue
        moved = corrected(
            originals[target.name].to(job.device),
            approximations[target.name].to(job.device),
            [g[target.name].to(job.device) for g in gradients],
            name=target.name,
        )
        _write(job, target, moved)
        exact[target.name] = moved.cpu()
    return exact


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
    result = gradient_pass(job.model, job.anatomy, job.ids[row : row + 1], needs={"gradient"})
    sets: dict[str, Tensor] = {}
    for name, output in result.outputs.items():
        assert output.gradient is not None
        sets[name] = output.gradient.float().cpu()
    return sets


def _stage_note(job: Job, stage: int, plan: Plan) -> str:
    dense = sum(e.rank is None for e in plan.entries)
    loss = plan.predicted_loss
    predicted = "" if loss is None else f", predicted loss change {loss:.3g}"
    return f"stage {stage}: {dense} of {len(plan.entries)} targets dense{predicted}"
