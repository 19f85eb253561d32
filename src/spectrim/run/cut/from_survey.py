"""Cut from a survey's decompositions: no text, no moments, no decomposition."""

from __future__ import annotations

import time

import torch
from torch import nn

from spectrim.allocate.curve import tail_energy
from spectrim.allocate.plan import Plan
from spectrim.layers.lowrank import LowRankLinear
from spectrim.model.weights import get_module, read_weight, replace_module
from spectrim.run.cut.cutting import cut_layer
from spectrim.run.job import Job
from spectrim.storage.survey_file import load_factors
from spectrim.storage.survey_record import Survey

__all__ = ["cut_from_survey", "holds"]


def holds(survey: Survey, plan: Plan) -> bool:
    """Whether the survey has every component that the plan keeps."""
    return all(e.rank is None or load_factors(survey, e.name).rank >= e.rank for e in plan.entries)


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
            for target in block.targets:
                rank = plan[target.name].rank
                if rank is None:
                    job.log.target(target.name, predicted_error=0.0, seconds=0.0)
                    continue
                started = time.perf_counter()
                original = get_module(job.model, target.name)
                factors = load_factors(survey, target.name)
                layer = cut_layer(original, factors, rank, balance=bool(job.recipe.refine))
                replace_module(job.model, target.name, layer)
                curve = curves[target.name]
                error = float(tail_energy(curve)[rank]) / curve.total if curve.total > 0 else 0.0
                job.log.target(
                    target.name,
                    predicted_error=error,
                    measured_weight_error=_weight_error(original, layer),
                    seconds=time.perf_counter() - started,
                )
            job.progress.advance(stage, block.name)
    job.progress.finish(stage)


def _weight_error(original: nn.Module, layer: LowRankLinear) -> float:
    """Relative squared error of the stored weight."""
    W = read_weight(original).double()
    return float((W - layer.dense_weight().to(W)).square().sum() / W.square().sum())
