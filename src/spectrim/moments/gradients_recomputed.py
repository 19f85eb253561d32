"""The gradient pass without the graph of all blocks: each block runs again when its turn comes.

The states in front of every block are kept for the windows of one batch, and from the last block to
the first a block is run with gradients. That is one forward more than the pass of `gradients.py`,
in a fraction of its memory; the model has to be in memory, and so have the sums of all blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from spectrim.devices import HOST
from spectrim.distributed.team import Team
from spectrim.model.anatomy import Anatomy
from spectrim.model.forward import evaluating
from spectrim.model.replay import Replay
from spectrim.moments.gradient_record import ComponentsOf, GradientPass
from spectrim.moments.gradients import folded_dtype, summed_loss, windows_at_once
from spectrim.moments.target_sums import PassSums


def pulled_back(
    replay: Replay, index: int, module: nn.Module, entered: Tensor, gradient: Tensor
) -> Tensor:
    """The loss's gradient in front of a block, from the one behind it; all are (B, T, d)."""
    entered = entered.requires_grad_()
    output = replay.run(index, module, entered)
    # Asked for the states' gradient only: no parameter's is computed.
    (found,) = torch.autograd.grad(output, entered, gradient)
    return found


def gradients_recomputed(
    replay: Replay,
    anatomy: Anatomy,
    ids: Tensor,
    *,
    needs: Collection[str],
    input_needs: Collection[str] = (),
    factors: ComponentsOf | None = None,
    clip: float | None = None,
    batch: int = 4,
    device: torch.device | str = HOST,
    on_batch: Callable[[int], None] = lambda done: None,
    team: Team | None = None,
) -> GradientPass:
    """What `gradient_pass` finds.

    Args:
        replay: the model, recorded with the windows of this process.
        anatomy: blocks and targets.
        ids: windows of all processes, (N, T) int64.
        needs: as for `gradient_pass`.
        input_needs: as for `gradient_pass`.
        factors: as for `gradient_pass`.
        clip: as for `gradient_pass`.
        batch: windows per pass.
        device: where blocks are worked on.
        on_batch: called with the number of windows done.
        team: the processes that share the windows.

    Raises:
        NonFiniteError: a gradient or the loss is not finite; names the target.
    """
    team, device = team or Team(), torch.device(device)
    mine = team.share(ids.shape[0])
    groups, dtype = tuple(anatomy.groups()), folded_dtype(replay.model)
    sums = PassSums(groups, needs, input_needs, factors, clip, device, mine.start, dtype)
    batch = windows_at_once(anatomy, batch)
    loss = 0.0
    for rows in replay.stream.batches(batch):
        hidden = replay.stream.read(rows, device)
        entering = []
        with evaluating(replay.model):
            for block in anatomy.blocks:
                entering.append(hidden)
                hidden = replay.run(block.index, replay.block(block.index), hidden)
            with torch.enable_grad():
                found = summed_loss(replay.tail, hidden.requires_grad_(), ids[mine][rows])
                (gradient,) = torch.autograd.grad(found, hidden)
            loss += float(found.detach())
            windows = len(gradient)
            with (
                sums.watching(replay.model.get_submodule, lambda n=windows: n),
                torch.enable_grad(),
            ):
                for block in reversed(anatomy.blocks):
                    module = replay.block(block.index)
                    gradient = pulled_back(replay, block.index, module, entering.pop(), gradient)
        sums.passed(*gradient.shape[:2])
        on_batch(windows)
    return sums.finish(team, loss=team.total(lambda: loss), tokens=ids[:, 1:].numel())
