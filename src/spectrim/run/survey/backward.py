"""The backward pass of a run, with what the recipe says about it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from spectrim.decompose import OBJECTIVES
from spectrim.model.recompute import is_large
from spectrim.moments.gradients import GradientPass, gradient_pass
from spectrim.moments.moments import OutputMoments
from spectrim.recipe import Decompose
from spectrim.run.job import Job

__all__ = ["backward_pass", "output_moments"]


def backward_pass(
    job: Job,
    choice: Decompose,
    *,
    needs: frozenset[str] | None = None,
    input_needs: frozenset[str] = frozenset(),
    windows: int | None = None,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> GradientPass:
    """One forward and one backward over the first windows, all targets at once.

    Args:
        job: the run; its model is left as it is.
        choice: objective and clipping.
        needs: output statistics; by default those of the objective.
        input_needs: input statistics to collect on the way.
        windows: how many, by default all.
        factors: components to score.

    Raises:
        NonFiniteError: a gradient or the loss is not finite; names the target.
    """
    stage = "gradients"
    ids = job.ids if windows is None else job.ids[:windows]
    needs = (
        frozenset(OBJECTIVES[choice.objective].needs & {"G", "fisher"}) if needs is None else needs
    )
    mine = job.team.share(len(ids))
    job.progress.start(stage, mine.stop - mine.start)

    def advance(done: int) -> None:
        for _ in range(done):
            job.progress.advance(stage)

    result = gradient_pass(
        job.model,
        job.anatomy,
        ids,
        needs=needs,
        input_needs=input_needs,
        factors=factors,
        clip=choice.clip,
        batch=job.batch,
        seed=job.recipe.seed,
        checkpointing=is_large(job.model),
        on_batch=advance,
        team=job.team,
    )
    job.progress.finish(stage)
    return result


def output_moments(job: Job) -> dict[str, OutputMoments]:
    """Gradient moments of every target if the recipe's objective needs them, else nothing.

    They belong to the original model; what a survey has gathered already is used again.
    """
    choice = job.recipe.decompose
    if not OBJECTIVES[choice.objective].needs & {"G", "fisher"}:
        return {}
    if job.outputs is None:
        with job.log.timed("gradients"):
            job.outputs = backward_pass(job, choice).outputs
    return job.outputs
