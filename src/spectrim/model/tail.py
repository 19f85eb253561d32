"""What a model does behind its last block, on a few tokens at a time.

The logits of a batch of windows over a large vocabulary take more memory than the model. Final
norm, output projection, soft-capping, scaling work on every token by itself, so they are taken in
pieces; and whatever an architecture does there, the model itself does it, run with its blocks
bypassed. One traced window says whether that gives the model's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import ModelError
from spectrim.model.blockcall import dressed
from spectrim.model.forward import (
    evaluating,
    forwards_replaced,
    hidden_of,
    home_device,
    run_window,
)
from spectrim.model.weights import get_module
from spectrim.tolerances import SAME_LOGITS

LOGITS_AT_ONCE = 2**23
"""Logits of a piece: 32 MiB in fp32, a few times over while a loss is taken."""

PROBED_TOKENS = 16
"""Tokens on which pieces are compared with the model's own logits."""

Loss = Callable[[Tensor, slice, slice], Tensor]
"""Logits (b, t, vocabulary) of some windows and positions, and which these are -> summed loss."""


class _LeftLastBlock(Exception):
    """Ends a forward pass behind the last block."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


def last_states(model: nn.Module, last: nn.Module, ids: Tensor) -> Tensor:
    """Hidden states behind the last block, (B, T, d); what follows it does not run.

    Args:
        model: in whatever mode; gradients flow if they are enabled.
        last: its last block.
        ids: windows (B, T).
    """

    def stop(_module: nn.Module, _args: tuple, output: Any) -> None:
        raise _LeftLastBlock(hidden_of(output))

    handle = last.register_forward_hook(stop)
    try:
        run_window(model, ids)
    except _LeftLastBlock as signal:
        return signal.hidden
    finally:
        handle.remove()
    raise ModelError(f"{type(model).__name__} does not run its last block")


def pieces(
    count: int, length: int, vocabulary: int, *, whole: bool = False
) -> Iterator[tuple[slice, slice]]:
    """Windows and positions of a batch whose logits are worked on together, in order.

    Args:
        count: windows.
        length: positions of each.
        vocabulary: logits of a position.
        whole: leave windows in one piece, however many logits they have.
    """
    together = max(1, LOGITS_AT_ONCE // vocabulary)
    rows, positions = max(1, together // max(1, length)), length if whole else together
    for first in range(0, count, rows):
        for start in range(0, length, positions):
            stop = min(start + positions, length)
            yield slice(first, min(first + rows, count)), slice(start, stop)


def blocks_in_sequence(model: nn.Module, ids: Tensor) -> tuple[str, ...]:
    """Module paths of a model's blocks, compressed or not; empty where there is no such list.

    They are the largest list of modules of which each runs once, one after the other, on `ids`.
    """
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    calls: list[nn.Module] = []
    handles = [
        member.register_forward_pre_hook(lambda module, _: calls.append(module))
        for member in dict.fromkeys(m for blocks in lists.values() for m in blocks)
    ]
    try:
        with evaluating(model):
            run_window(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    fitting = {
        name: blocks
        for name, blocks in lists.items()
        if [module for module in calls if module in set(blocks)] == blocks
    }
    if not fitting:
        return ()
    largest = max(fitting, key=lambda name: sum(map(_numbers, fitting[name])))
    return tuple(f"{largest}.{i}" for i in range(len(fitting[largest])))


def _numbers(module: nn.Module) -> int:
    return sum(t.numel() for t in (*module.parameters(), *module.buffers()))


class Tail:
    """Final norm and head of one model.

    Attributes:
        faithful: whether running the model with its blocks bypassed gives its own logits.
        by_token: whether it gives them on any part of a window as well.

    Args:
        model: its blocks may be replaced later on.
        names: module paths of the blocks.
        extras: how many more elements each block returns in a tuple; None where it returns a
            tensor.
        hidden: states behind the last block of one window's first tokens, (1, t, d).
        logits: the model's own there, (1, t, vocabulary).
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        extras: Sequence[int | None],
        hidden: Tensor,
        logits: Tensor,
    ):
        self.model, self.names, self.extras = model, tuple(names), tuple(extras)
        self.vocabulary = logits.shape[-1]
        split = max(1, hidden.shape[1] // 3)
        self.faithful = _same(self.logits(hidden), logits)
        parts = [self.logits(part) for part in (hidden[:, :split], hidden[:, split:])]
        self.by_token = self.faithful and _same(torch.cat(parts, 1), logits)

    @classmethod
    def find(cls, model: nn.Module, names: Sequence[str], ids: Tensor) -> Tail:
        """Trace the first tokens of one of the windows `ids` (N, T) through the model."""
        extras: list[int | None] = []
        states: list[Tensor] = []

        def leave(_module: nn.Module, _args: tuple, output: Any) -> None:
            extras.append(len(output) - 1 if isinstance(output, tuple) else None)
            states[:] = [hidden_of(output)]

        handles = [get_module(model, name).register_forward_hook(leave) for name in names]
        with evaluating(model):
            try:
                logits = run_window(model, ids[:1, :PROBED_TOKENS]).logits
            finally:
                for handle in handles:
                    handle.remove()
            return cls(model, names, extras, states[0], logits)

    def states(self, ids: Tensor) -> Tensor:
        """Hidden states behind the last block, (B, T, d); gradients flow if enabled."""
        return last_states(self.model, get_module(self.model, self.names[-1]), ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) from states behind the last block; gradients flow if enabled.

        The model itself runs with its blocks bypassed, so that final norm, output projection,
        soft-capping and scaling are whatever the architecture does.
        """
        home = hidden.to(home_device(self.model))
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
        blocks = [get_module(self.model, name) for name in self.names]
        with forwards_replaced(blocks, lambda i: lambda *_, **__: dressed(home, self.extras[i])):
            return run_window(self.model, ids).logits

    def pieces(self, hidden: Tensor) -> Iterator[tuple[slice, slice]]:
        """Windows and positions that are taken together, in order.

        Raises:
            ModelError: what follows the blocks is not a function of their states.
        """
        if not self.faithful:
            raise ModelError(
                f"the logits of {type(self.model).__name__} cannot be found from the hidden states "
                "behind its last block; use a recipe that needs no gradients of the loss there"
            )
        count, length, _ = hidden.shape
        yield from pieces(count, length, self.vocabulary, whole=not self.by_token)

    def total(self, hidden: Tensor, loss: Loss) -> Tensor:
        """Sum of a loss over all tokens, piece by piece; differentiable in `hidden` (B, T, d).

        Gradients of the states are formed with the loss, so that a piece's logits are gone before
        the next one's are made; parameters of norm and head get none.
        """
        return _ByPiece.apply(hidden, self, loss)


class _ByPiece(torch.autograd.Function):
    """A summed loss whose gradient is found on the way forward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tail: Tail, loss: Loss) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        losses = []
        for rows, positions in tail.pieces(hidden):
            with torch.set_grad_enabled(wanted):
                part = hidden[rows, positions].detach().requires_grad_(wanted)
                found = loss(tail.logits(part), rows, positions)
            if gradient is not None:
                (gradient[rows, positions],) = torch.autograd.grad(found, part)
            losses.append(found.detach())
        ctx.save_for_backward(gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0].to(gradient), None, None


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether logits agree but for rounding in their dtype."""
    if found.shape != expected.shape:
        return False
    found, expected = found.double().cpu(), expected.double().cpu()
    # Models mask tokens that do not exist with -inf.
    finite = expected.isfinite()
    if not torch.equal(finite, found.isfinite()):
        return False
    difference = (found - expected)[finite].abs().max()
    return bool(difference <= SAME_LOGITS * expected[finite].abs().max())
