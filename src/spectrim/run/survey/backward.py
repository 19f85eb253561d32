"""The backward pass of a run, with what the recipe says about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from spectrim.decompose import OBJECTIVES
from spectrim.model.anatomy import Block
from spectrim.model.onload import give_back
from spectrim.moments.folded import Folded
from spectrim.moments.gradient_record import ComponentsOf, GradientPass
from spectrim.moments.gradients import folded_dtype, gradient_pass
from spectrim.moments.gradients_by_block import gradients_by_block
from spectrim.moments.gradients_recomputed import gradients_recomputed
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.recipe import Decompose
from spectrim.run.job import Job
from spectrim.run.kept_moments import KeptMoments, flattened, restored
from spectrim.run.recorded import recorded

STAGE = "gradients"


def backward_pass(
    job: Job,
    choice: Decompose,
    *,
    needs: frozenset[str] | None = None,
    input_needs: frozenset[str] = frozenset(),
    ids: Tensor | None = None,
    factors: ComponentsOf | None = None,
) -> Iterator[tuple[Block, GradientPass]]:
    """Gradients of some windows, block by block, all targets of a block at once.

    The run's room says how: one forward and one backward for all blocks, the same with a block's
    graph at a time, or block by block from the last to the first, with as much in memory as one
    block needs.

    Args:
        job: the run; its model is left as it is.
        choice: objective and clipping.
        needs: output statistics; by default those of the objective.
        input_needs: input statistics to collect on the way.
        ids: windows, by default all of the run's.
        factors: components to score.

    Raises:
        NonFiniteError: a gradient or the loss is not finite; names the target.
    """
    ids = job.ids if ids is None else ids
    options = {
        "needs": OBJECTIVES[choice.objective].outputs if needs is None else needs,
        "input_needs": input_needs,
        "factors": factors,
        "clip": choice.clip,
        "batch": job.room.graph,
        "team": job.team,
    }
    if by_block(job):
        yield from pass_by_block(job, ids, STAGE, **options)
        return
    whole = _all_blocks(job, ids, options)
    give_back()
    for block in job.anatomy.blocks:
        yield block, whole.of(block)
    job.progress.finish(STAGE)


def pass_by_block(
    job: Job, ids: Tensor, stage: str, **options: Any
) -> Iterator[tuple[Block, GradientPass]]:
    """Gradients of some windows from the last block to the first; components in a block's turn.

    Args:
        job: the run; its model is left as it is.
        ids: windows.
        stage: for progress.
        options: of `gradients_by_block`.
    """
    job.progress.start(stage, 2 * len(job.anatomy.blocks))
    yield from gradients_by_block(
        recorded(job, ids),
        job.anatomy,
        ids,
        at_hand=job.keeper.at_hand,
        device=job.device,
        folder=job.options.streams,
        on_block=lambda: job.progress.advance(stage),
        **options,
    )
    job.progress.finish(stage)


def _all_blocks(job: Job, ids: Tensor, options: dict[str, Any]) -> GradientPass:
    """Gradients of all blocks at once, their sums in memory."""
    mine = job.team.share(len(ids))
    job.progress.start(STAGE, mine.stop - mine.start)

    def advance(done: int) -> None:
        for _ in range(done):
            job.progress.advance(STAGE)

    if job.room.backward != "recomputed":
        return gradient_pass(job.model, job.anatomy, ids, on_batch=advance, **options)
    more = {"device": job.device, "on_batch": advance, **options}
    return gradients_recomputed(recorded(job, ids), job.anatomy, ids, **more)


def by_block(job: Job) -> bool:
    """Whether gradients are taken one block at a time: not even all sums fit into memory."""
    return job.room.backward == "by block"


def gathered_moments(
    job: Job,
    choice: Decompose,
    *,
    ids: Tensor | None = None,
    input_needs: frozenset[str] = frozenset(),
    stage: str = "cut",
) -> tuple[Mapping[str, OutputMoments], Mapping[str, Moments]]:
    """Output moments of every target and input moments of every group, by their first target.

    Of a model that is large or not in memory they lie in the work folder, where there is one, and
    are read when they are asked for. Otherwise they are folded in memory.

    Args:
        job: the run.
        choice: objective and clipping.
        ids: windows, by default all of the run's.
        input_needs: input statistics to collect on the way.
        stage: whose gradients these are; what an earlier run gathered for it is used again.
    """
    blocks, keeper = job.anatomy.blocks, job.keeper
    names = {block: f"{stage}-gradients-{block.index:03d}" for block in blocks}
    lies = by_block(job) and keeper.work is not None
    dtype = folded_dtype(job.model)
    outputs, inputs = Folded[OutputMoments](dtype), Folded[Moments](dtype)
    if not all(keeper.has(name) for name in names.values()):
        for block, found in backward_pass(job, choice, ids=ids, input_needs=input_needs):
            if not keeper.has(names[block]):
                keeper.save(names[block], *flattened({"out": found.outputs, "in": found.inputs}))
            if not lies:
                outputs.take(found.outputs)
                inputs.take(found.inputs)
            del found  # before the next block's moments are gathered
    elif not lies:
        for name in names.values():
            file, numbers = keeper.load(name)
            outputs.take(restored(file, numbers, "out", OutputMoments, job.device))
            inputs.take(restored(file, numbers, "in", Moments, job.device))
    if not lies:
        return outputs, inputs
    return (
        KeptMoments(keeper.load, job.device, names, "out", OutputMoments),
        KeptMoments(keeper.load, job.device, names, "in", Moments),
    )


def output_moments(job: Job) -> Mapping[str, OutputMoments]:
    """Gradient moments of every target if the recipe's objective needs them, else nothing.

    What a survey has gathered already is used again.
    """
    choice = job.recipe.decompose
    if not OBJECTIVES[choice.objective].outputs:
        return {}
    if job.outputs is None:
        with job.log.timed("gradients"):
            job.outputs, _ = gathered_moments(job, choice)
    return job.outputs
