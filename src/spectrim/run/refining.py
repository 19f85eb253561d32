"""Block refinement as a step of a run: recipe in, trained block and report entry out."""

from __future__ import annotations

from dataclasses import asdict

from torch import nn

from spectrim.errors import NonFiniteError
from spectrim.model.anatomy import Block
from spectrim.model.replay import Replay
from spectrim.model.stream import Stream
from spectrim.model.weights import get_module
from spectrim.recipe import BlockRefinement
from spectrim.refine.block import BlockTraining, refine_block
from spectrim.run.job import Job

__all__ = ["refine"]


def _looked_ahead(job: Job, replay: Replay, step: BlockRefinement, block: Block, targets: Stream):
    """The blocks that the error is seen through, and the original network's output behind them."""
    ahead = job.anatomy.blocks[block.index + 1 : block.index + 1 + step.look_ahead]
    if not ahead:
        return (), targets
    beyond = Stream.empty(*targets.shape, targets.dtype, job.offload_streams)
    for rows in targets.batches(job.batch):
        hidden = targets.read(rows, job.device)
        for following in ahead:
            hidden = replay.run(following.index, get_module(job.model, following.name), hidden)
        beyond.write(rows, hidden)
    return ahead, beyond


def refine(
    job: Job,
    replay: Replay,
    step: BlockRefinement,
    block: Block,
    compressed: nn.Module,
    inputs: Stream,
    targets: Stream,
) -> str:
    """Train one compressed block in place; returns a note for the progress line.

    Raises:
        NonFiniteError: the training diverged and `on_failure` is not `keep-unrefined`.
    """
    ahead, beyond = _looked_ahead(job, replay, step, block, targets)

    def run(hidden):
        hidden = replay.run(block.index, compressed, hidden)
        for following in ahead:
            hidden = replay.run(following.index, get_module(job.model, following.name), hidden)
        return hidden

    training = BlockTraining(
        seed=job.recipe.seed + block.index, **step.model_dump(exclude={"step", "look_ahead"})
    )
    try:
        loss = refine_block(
            block.name,
            compressed,
            run,
            inputs,
            beyond,
            training,
            device=job.device,
            autocast=job.device.type != "cpu",
        )
    except NonFiniteError as error:
        if job.on_failure != "keep-unrefined":
            raise
        job.log.notes.append(f"{error} The unrefined block was kept, as asked.")
        return f"{block.name} kept unrefined"
    if not loss.selected:
        job.log.notes.append(f"{block.name}: no window was held out, the last epoch was kept")
    job.log.blocks[block.name] = asdict(loss)
    return f"{block.name} loss {loss.before:.3g} -> {loss.after:.3g}"
