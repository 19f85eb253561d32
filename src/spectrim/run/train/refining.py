"""Block refinement as a step of a run: recipe in, trained block and report entry out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict

from torch import Tensor, nn

from spectrim.distributed.pool import Pool
from spectrim.errors import NonFiniteError, RecipeError
from spectrim.model.anatomy import Block
from spectrim.model.replay import Replay
from spectrim.model.stream import Stream
from spectrim.model.weights import get_module
from spectrim.recipe import BlockRefinement, Recipe
from spectrim.refine.block import BlockTraining, refine_block
from spectrim.refine.masters import frozen
from spectrim.run.job import Job


def check_steps(recipe: Recipe) -> None:
    """Refuse refinement steps that the flow would pass over.

    Raises:
        RecipeError: a step that needs another flow, or is given twice, or comes too late.
    """
    names = [step.step for step in recipe.refine]
    flows = {"closed_form": "sequential", "block": "sequential", "projected_gradient": "one-shot"}
    for i, name in enumerate(names):
        if name not in flows:
            continue
        if recipe.flow != flows[name]:
            raise RecipeError(
                f"the refinement step {name!r} needs flow: {flows[name]}, but the recipe "
                f"{recipe.name!r} has flow: {recipe.flow}"
            )
        if name in names[:i]:
            raise RecipeError(f"the refinement step {name!r} is given twice; give it once")
        if any(earlier not in flows for earlier in names[:i]):
            raise RecipeError(
                f"the refinement step {name!r} comes after {names[i - 1]!r}, which needs all "
                "blocks to be cut; put it first"
            )


def _looked_ahead(
    job: Job, replay: Replay, step: BlockRefinement, block: Block, targets: Stream
) -> tuple[Sequence[Block], Stream]:
    """The blocks that the error is seen through, and the original network's output behind them."""
    ahead = job.anatomy.blocks[block.index + 1 : block.index + 1 + step.look_ahead]
    if not ahead:
        return (), targets
    beyond = Stream.empty(*targets.shape, targets.dtype, job.options.streams)
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
    with ExitStack() as stack:
        for ahead in job.anatomy.blocks[block.index + 1 : block.index + 1 + step.look_ahead]:
            stack.enter_context(job.keeper.at_hand(ahead))
        return _refine(job, replay, step, block, compressed, inputs, targets)


def _refine(
    job: Job,
    replay: Replay,
    step: BlockRefinement,
    block: Block,
    compressed: nn.Module,
    inputs: Stream,
    targets: Stream,
) -> str:
    ahead, beyond = _looked_ahead(job, replay, step, block, targets)
    following = [(b.index, get_module(job.model, b.name)) for b in ahead]

    def run(hidden: Tensor) -> Tensor:
        hidden = replay.unchecked(block.index, compressed, hidden)
        for index, module in following:
            # These keep their dtype, while the trained block has fp32 masters.
            states = hidden.to(next(module.parameters()).dtype)
            hidden = replay.unchecked(index, module, states)
        return hidden

    pool = Pool(job.team, len(job.ids), (inputs, beyond))
    training = BlockTraining(
        seed=job.recipe.seed + block.index,
        micro_batch=job.batch,
        **step.model_dump(exclude={"step", "look_ahead"}),
    )

    def judged(at: int, loss: float) -> None:
        job.progress.advance(stage, f"{block.name} loss {loss:.3g}")

    stage = f"refine block {block.index + 1}"
    job.progress.start(stage, step.epochs)
    try:
        with frozen([p for _, module in following for p in module.parameters()]):
            about = {"device": job.device, "on_judged": judged}
            loss = refine_block(block.name, compressed, run, pool, training, **about)
    except NonFiniteError as error:
        if job.options.on_failure != "keep-unrefined":
            raise
        job.progress.finish(stage)
        job.log.notes.append(f"{error} The unrefined block was kept, as asked.")
        return f"{block.name} kept unrefined"
    job.progress.finish(stage)
    if not loss.selected:
        job.log.notes.append(f"{block.name}: no window was held out, the last epoch was kept")
    job.log.blocks[block.name] = asdict(loss)
    return f"{block.name} loss {loss.before:.3g} -> {loss.after:.3g}"
