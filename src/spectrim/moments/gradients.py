"""Loss gradients of every target of a model in memory: one backward pass per batch, all at once.

What is summed is in `target_sums.py`; the same a block at a time is in `gradients_by_block.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from spectrim.distributed.team import Team
from spectrim.errors import NonFiniteError
from spectrim.model.anatomy import Anatomy
from spectrim.model.losses import next_token
from spectrim.model.onload import give_back
from spectrim.model.tail import Tail
from spectrim.moments.gradient_record import ComponentsOf, GradientPass
from spectrim.moments.target_sums import PassSums


@contextmanager
def _only_activations_need_gradients(model: Any) -> Iterator[None]:
    """Freeze all parameters and start the graph at the embeddings."""
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    was_training = model.training
    model.requires_grad_(False)
    model.eval()
    handle = model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_(True)
    )
    try:
        yield
    finally:
        handle.remove()
        model.train(was_training)
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])


def folded_dtype(model: Any) -> torch.dtype:
    """Of symmetric sums over all blocks at once: fp32, or fp64 where the model is."""
    return torch.promote_types(model.get_input_embeddings().weight.dtype, torch.float32)


def summed_loss(tail: Tail, hidden: Tensor, ids: Tensor) -> Tensor:
    """Summed next-token cross-entropy in nats, fp32 or better: t predicts t + 1, once.

    Args:
        tail: of the model.
        hidden: states behind its last block, (B, T, d); differentiable in them.
        ids: the windows (B, T), on any device.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    loss = tail.total(hidden[:, :-1], next_token(ids))
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError("the loss of a batch of windows is not finite; try --dtype float32")
    return loss


def windows_at_once(anatomy: Anatomy, batch: int) -> int:
    """Windows per pass; one in a mixture, where an expert's tokens do not say from which they are.

    All passes keep to it, also where no expert is near: other products would round otherwise.
    """
    return 1 if anatomy.is_mixture else batch


def gradient_pass(
    model: Any,
    anatomy: Anatomy,
    ids: Tensor,
    *,
    needs: Collection[str],
    input_needs: Collection[str] = (),
    factors: ComponentsOf | None = None,
    clip: float | None = None,
    batch: int = 4,
    on_batch: Callable[[int], None] = lambda done: None,
    team: Team | None = None,
) -> GradientPass:
    """One forward and one backward over the windows; all targets at once.

    A team splits the windows; every rank gets the sums over all of them.

    Args:
        model: the decoder, on its device.
        anatomy: its targets.
        ids: windows, (N, T) int64.
        needs: any of `G`, `fisher`, `gradient`: which output statistics to accumulate.
        input_needs: statistics of the group inputs to accumulate in the same pass.
        factors: target name -> (up (out, r), down (r, in)) or None; gives component scores.
        clip: token gradients in `G` are clipped to this multiple of the window's mean norm.
        batch: windows per pass.
        on_batch: called with the number of windows done.
        team: the processes that share the windows; each is given all of `ids`.

    Raises:
        NonFiniteError: a gradient or the loss is not finite; names the target.
    """
    team = team or Team()
    mine = team.share(ids.shape[0])
    device = model.get_input_embeddings().weight.device
    groups, dtype = tuple(anatomy.groups()), folded_dtype(model)
    tail = Tail.find(model, [block.name for block in anatomy.blocks], ids)
    sums = PassSums(groups, needs, input_needs, factors, clip, device, mine.start, dtype)
    batch = windows_at_once(anatomy, batch)
    loss, chunk = 0.0, ids[:0]
    with (
        _only_activations_need_gradients(model),
        sums.watching(model.get_submodule, lambda: chunk.shape[0]),
        torch.enable_grad(),
    ):
        for i in range(mine.start, mine.stop, batch):
            chunk = ids[i : min(i + batch, mine.stop)].to(device)
            found = summed_loss(tail, tail.states(chunk), chunk)
            found.backward()
            sums.passed(*chunk.shape)
            loss += float(found.detach())
            del found
            give_back()
            on_batch(chunk.shape[0])
    total = team.total(lambda: loss)
    return sums.finish(team, loss=total, tokens=ids[:, 1:].numel())
