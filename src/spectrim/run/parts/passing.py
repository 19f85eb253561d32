"""A stream that passes a block, and the moments of the block's inputs on the way."""

from __future__ import annotations

from spectrim.model.anatomy import Block
from spectrim.model.capture import capture_inputs
from spectrim.model.replay import Replay
from spectrim.model.weights import get_module
from spectrim.moments.accumulate import accumulator_of
from spectrim.moments.experts import BlockMoments
from spectrim.moments.gradients import folded_dtype
from spectrim.run.job import Job

CUT = "cut"
"""Stage under which finished blocks are kept."""


def advance(job: Job, replay: Replay, block: Block) -> None:
    """Move the stream past a block as it stands in the model."""
    replay.advance(block.index, replay.stream, job.batch, job.device)


def block_moments(job: Job, replay: Replay, block: Block, needs: frozenset[str]) -> BlockMoments:
    """Moments of every group of a block from one forward pass, which also advances the stream.

    They are sums over the windows of all processes.
    """
    module = get_module(job.model, block.name)
    like = folded_dtype(job.model)
    sums = [accumulator_of(group, needs, like=like, device=job.device) for group in block.groups]

    def feed(group, x):
        sums[group.index].add(x)

    with capture_inputs(module, block.groups, feed):
        advance(job, replay, block)
    for one in sums:
        one.reduce(job.team)
    return BlockMoments(block.groups, dict(enumerate(sums)))
