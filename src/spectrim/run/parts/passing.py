"""A stream that passes a block, and the moments of the block's inputs on the way."""

from __future__ import annotations

from spectrim.model.anatomy import Block
from spectrim.model.replay import Replay, capture_inputs
from spectrim.model.weights import get_module
from spectrim.moments.accumulate import MomentAccumulator
from spectrim.moments.moments import Moments, reduced
from spectrim.run.job import Job

__all__ = ["CUT", "advance", "block_moments"]

CUT = "cut"
"""Stage under which finished blocks are kept."""


def advance(job: Job, replay: Replay, block: Block) -> None:
    """Move the stream past a block as it stands in the model."""
    replay.advance(block.index, replay.stream, job.batch, job.device)


def block_moments(job: Job, replay: Replay, block: Block, needs: frozenset[str]) -> list[Moments]:
    """Moments of every group of a block from one forward pass, which also advances the stream.

    They are sums over the windows of all processes.
    """
    module = get_module(job.model, block.name)
    accumulators = [MomentAccumulator(g.targets[0].name, needs) for g in block.groups]

    def feed(group, x):
        accumulators[group.index].add(x)

    with capture_inputs(module, block.groups, feed):
        advance(job, replay, block)
    return [reduced(a.moments(), job.team) for a in accumulators]
