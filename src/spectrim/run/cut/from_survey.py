"""Cut from a survey's decompositions: no text, no moments, no decomposition."""

from __future__ import annotations

import time

import torch
from torch import nn

from spectrim.allocate.curve import Curve, tail_energy
from spectrim.allocate.plan import Plan
from spectrim.layers.lowrank import LowRankLinear
from spectrim.model.weights import get_module, read_weight, replace_module
from spectrim.run.job import Job
from spectrim.run.parts.cutting import cut_layer
from spectrim.run.parts.passing import CUT
from spectrim.storage.survey_file import held_ranks, load_factors
from spectrim.storage.survey_record import Survey


def holds(survey: Survey, plan: Plan) -> bool:
    """Whether the survey has every component that the plan keeps."""
    held = held_ranks(survey)
    return all(e.rank is None or held[e.name] >= e.rank for e in plan.entries)


@torch.no_grad()
def cut_from_survey(job: Job, plan: Plan, survey: Survey) -> None:
    """Replace every target of the plan by the survey's leading components, in place.

    Args:
        job: the run; its model is changed.
        plan: rank per target.
        survey: of this model, with enough components (`holds`).

    Raises:
        ArtifactError: the factors cannot be read.
    """
    stage = "cut"
    curves = {c.name: c for c in survey.curves}
    job.progress.start(stage, len(job.anatomy.blocks))
    with job.log.timed(stage):
        for block in job.anatomy.blocks:
            with job.keeper.at_hand(block):
                if job.keeper.is_finished(CUT, block):
                    job.keeper.restore(CUT, block)
                else:
                    for target in block.targets:
                        _cut_target(job, plan[target.name].rank, survey, curves[target.name])
                    job.keeper.finish(CUT, block)
            job.progress.advance(stage, block.name)
    job.progress.finish(stage)


def _cut_target(job: Job, rank: int | None, survey: Survey, curve: Curve) -> None:
    """Put a target's leading components in its place; None leaves it dense."""
    name = curve.name
    if rank is None:
        job.log.target(name, predicted_error=0.0, seconds=0.0)
        return
    started = time.perf_counter()
    original = get_module(job.model, name)
    layer = cut_layer(original, load_factors(survey, name), rank, balance=bool(job.recipe.refine))
    replace_module(job.model, name, layer)
    job.log.target(
        name,
        predicted_error=float(tail_energy(curve)[rank]) / curve.total if curve.total > 0 else 0.0,
        measured_weight_error=_weight_error(original, layer),
        seconds=time.perf_counter() - started,
    )


def _weight_error(original: nn.Module, layer: LowRankLinear) -> float:
    """Relative squared error of the stored weight."""
    W = read_weight(original).double()
    size = float(W.square().sum())
    left = float((W - layer.dense_weight().to(W)).square().sum())
    return left / size if size > 0 else 0.0
