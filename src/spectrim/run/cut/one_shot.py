"""One pass over the original network: moments, decomposition and cut, block by block.

Cutting a block cannot change what later blocks see here, because the stream carries the original
network's hidden states (or is absent, for objectives without inputs). Memory is one block, its
moments and the stream. A block that an earlier run has cut is passed by the stream and taken from
the work folder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spectrim.allocate.plan import Plan
from spectrim.decompose import OBJECTIVES
from spectrim.model.anatomy import Block
from spectrim.model.replay import Replay, capture_inputs, record
from spectrim.model.weights import get_module, replace_module
from spectrim.moments.accumulate import MomentAccumulator
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.run.cut.cutting import replace_target
from spectrim.run.job import Job

__all__ = ["CUT", "advance", "block_moments", "cut_one_shot"]

CUT = "cut"
"""Stage under which finished blocks are kept."""


@torch.no_grad()
def advance(job: Job, replay: Replay, block: Block) -> None:
    """Move the stream past a block as it stands in the model."""
    module = get_module(job.model, block.name)
    for rows in replay.stream.batches(job.batch):
        replay.stream.write(
            rows, replay.run(block.index, module, replay.stream.read(rows, job.device))
        )


def block_moments(job: Job, replay: Replay, block: Block, needs: frozenset[str]) -> list[Moments]:
    """Moments of every group of a block from one forward pass, which also advances the stream."""
    module = get_module(job.model, block.name)
    accumulators = [MomentAccumulator(g.targets[0].name, needs) for g in block.groups]

    def feed(group, x):
        accumulators[group.index].add(x)

    with capture_inputs(module, block.groups, feed):
        advance(job, replay, block)
    return [a.moments() for a in accumulators]


@torch.no_grad()
def cut_one_shot(job: Job, plan: Plan, outputs: Mapping[str, OutputMoments] | None = None) -> None:
    """Replace every target of the plan by its best rank-k layer, in place.

    Args:
        job: the run; its model is changed.
        plan: rank per target.
        outputs: gradient moments for objectives that need them.
    """
    needs = frozenset(OBJECTIVES[job.recipe.decompose.objective].needs) & {"C", "absolute"}
    stage = "compress"
    job.progress.start(stage, len(job.anatomy.blocks))
    unfinished = not job.keeper.all_finished(CUT, job.anatomy.blocks)
    with job.log.timed(stage):
        replay = (
            record(
                job.model,
                job.ids,
                batch=job.batch,
                device=job.device,
                anatomy=job.anatomy,
                folder=job.offload_streams,
            )
            if needs and unfinished
            else None
        )
        for block in job.anatomy.blocks:
            with job.keeper.at_hand(block):
                if job.keeper.is_finished(CUT, block):
                    if replay is not None:
                        advance(job, replay, block)
                    job.keeper.restore(CUT, block)
                else:
                    _cut_block(job, plan, block, replay, needs, outputs or {})
                    job.keeper.finish(CUT, block)
            job.progress.advance(stage, block.name)
    job.progress.finish(stage)


def _cut_block(
    job: Job,
    plan: Plan,
    block: Block,
    replay: Replay | None,
    needs: frozenset[str],
    outputs: Mapping[str, OutputMoments],
) -> None:
    moments = (
        block_moments(job, replay, block, needs)
        if replay is not None
        else [None] * len(block.groups)
    )
    for group in block.groups:
        for target in group.targets:
            layer, facts = replace_target(
                target,
                get_module(job.model, target.name),
                plan[target.name],
                job.recipe.decompose,
                moments[group.index],
                outputs.get(target.name),
                balance=bool(job.recipe.refine),
            )
            replace_module(job.model, target.name, layer)
            job.log.target(target.name, **facts)
