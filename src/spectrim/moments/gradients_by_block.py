"""The gradient pass for models that are large or not in memory: one block at a time.

The states that enter every s-th of L blocks are kept, s = ceil(sqrt(L)). From the last segment of
s blocks to the first the states inside a segment are computed again, and from its last block to
its first a block is run with gradients, from the states that enter it and the gradients behind it.

So a block's weights are needed three times and about 2 s streams are held instead of L, for two
forwards more than the pass of `gradients.py`; activations and sums are those of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from math import ceil, sqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from spectrim.devices import HOST
from spectrim.distributed.team import Team
from spectrim.model.anatomy import Anatomy, Block
from spectrim.model.forward import evaluating
from spectrim.model.replay import Replay
from spectrim.model.stream import Stream
from spectrim.moments.gradient_record import ComponentsOf, GradientPass
from spectrim.moments.gradients import folded_dtype, summed_loss, windows_at_once
from spectrim.moments.gradients_recomputed import pulled_back
from spectrim.moments.target_sums import PassSums


def spacing(blocks: int) -> int:
    """Every how many blocks the states are kept."""
    return ceil(sqrt(blocks))


def streams_held(blocks: int) -> int:
    """Streams that exist at the same time at most, gradients among them."""
    return ceil(blocks / spacing(blocks)) + spacing(blocks) + 1


def gradients_by_block(
    replay: Replay,
    anatomy: Anatomy,
    ids: Tensor,
    *,
    at_hand: Callable[[Block], AbstractContextManager[nn.Module]],
    needs: Collection[str],
    input_needs: Collection[str] = (),
    factors: ComponentsOf | None = None,
    clip: float | None = None,
    batch: int = 4,
    device: torch.device | str = HOST,
    folder: Path | None = None,
    on_block: Callable[[], None] = lambda: None,
    team: Team | None = None,
) -> Iterator[tuple[Block, GradientPass]]:
    """What `gradient_pass` finds, block by block from the last to the first.

    Args:
        replay: the model, recorded with the windows of this process; its stream is used up.
        anatomy: blocks and targets.
        ids: windows of all processes, (N, T) int64.
        at_hand: brings a block into memory for the time of a context.
        needs: as for `gradient_pass`.
        input_needs: as for `gradient_pass`.
        factors: as for `gradient_pass`; asked for a block's targets when the block's turn comes.
        clip: as for `gradient_pass`.
        batch: windows per pass.
        device: where blocks are worked on.
        folder: where to map streams to files, None for memory.
        on_block: called when a block is passed, on the way there and on the way back.
        team: the processes that share the windows.

    Raises:
        NonFiniteError: a gradient or the loss is not finite; names the target.
    """
    team, device = team or Team(), torch.device(device)
    batch = windows_at_once(anatomy, batch)
    mine = team.share(ids.shape[0])
    entering, last = _entering(replay, anatomy, at_hand, batch, device, folder, on_block)
    loss, gradients = _gradients_of_loss(replay, ids[mine], last, batch, device)
    total, tokens = team.total(lambda: loss), ids[:, 1:].numel()
    for first in reversed(entering):
        segment = anatomy.blocks[first : first + spacing(len(anatomy.blocks))]
        states = [entering[first]]
        for block in segment[:-1]:
            states.append(states[-1].duplicate(folder))
            with at_hand(block):
                replay.advance(block.index, states[-1], batch, device)
        for block, entered in zip(reversed(segment), reversed(states), strict=True):
            wanted = (needs, input_needs, factors, clip)
            sums = PassSums(block.groups, *wanted, device, mine.start, folded_dtype(replay.model))
            with at_hand(block) as module:
                _step_back(replay, block, module, entered, gradients, sums, batch, device)
            entered.close()
            yield block, sums.finish(team, loss=total, tokens=tokens)
            del sums  # before the next block's are made
            on_block()


def _entering(
    replay: Replay,
    anatomy: Anatomy,
    at_hand: Callable[[Block], AbstractContextManager[nn.Module]],
    batch: int,
    device: torch.device,
    folder: Path | None,
    on_block: Callable[[], None],
) -> tuple[dict[int, Stream], Stream]:
    """States that enter every s-th block, by its number, and those that leave the last block."""
    entering: dict[int, Stream] = {}
    moving = replay.stream
    for block in anatomy.blocks:
        if block.index % spacing(len(anatomy.blocks)) == 0:
            entering[block.index] = moving
            moving = moving.duplicate(folder)
        with at_hand(block):
            replay.advance(block.index, moving, batch, device)
        on_block()
    return entering, moving


def _gradients_of_loss(
    replay: Replay, ids: Tensor, last: Stream, batch: int, device: torch.device
) -> tuple[float, Stream]:
    """The summed loss, and its gradients in the place of the states behind the last block."""
    loss = 0.0
    for rows in last.batches(batch):
        with evaluating(replay.model), torch.enable_grad():
            hidden = last.read(rows, device).requires_grad_()
            found = summed_loss(replay.tail, hidden, ids[rows])
            (gradient,) = torch.autograd.grad(found, hidden)
        last.write(rows, gradient)
        loss += float(found.detach())
    return loss, last


def _step_back(
    replay: Replay,
    block: Block,
    module: nn.Module,
    entered: Stream,
    gradients: Stream,
    sums: PassSums,
    batch: int,
    device: torch.device,
) -> None:
    """From gradients behind a block to gradients in front of it; what its targets see is summed."""
    hidden = entered.read(slice(0, 0), device)
    watched = sums.watching(replay.model.get_submodule, lambda: hidden.shape[0])
    with evaluating(module), watched, torch.enable_grad():
        for rows in entered.batches(batch):
            hidden = entered.read(rows, device)
            behind = gradients.read(rows, device)
            gradients.write(rows, pulled_back(replay, block.index, module, hidden, behind))
            sums.passed(*hidden.shape[:2])
