"""Run a decoder block by block with the arguments that a real forward pass gave its blocks.

One window goes through the whole model and leaves, for every block, all arguments besides the
hidden states: masks, rotary embeddings, whatever the architecture passes, different from layer to
layer where the model says so. Recorded at batch size 1, they broadcast over any batch; where they
do not (a tensor with one row per window and head), they are recorded again at every batch size that
is used, with the blocks bypassed. For all windows only the embedding runs, up to the door of
block 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from spectrim.devices import HOST
from spectrim.errors import ModelError
from spectrim.model.anatomy import Anatomy
from spectrim.model.blockcall import BlockCall, split_hidden
from spectrim.model.forward import (
    evaluating,
    hidden_of,
    run_window,
)
from spectrim.model.stream import Stream
from spectrim.model.tail import Tail
from spectrim.model.tracing import trace
from spectrim.model.visits import (
    bypassed,
    calls_of,
    check_finite_states,
    check_token_independent,
    need_own_batch,
    observe,
)
from spectrim.model.weights import get_module


class _EnteredFirstBlock(Exception):
    """Ends a forward pass at the door of block 0."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


@dataclass
class Replay:
    """A recorded model: the states that enter block 0, and how to run every block and the rest.

    Attributes:
        model: the model itself, used again by `finish`.
        names: module paths of the blocks.
        calls: how each block is called; tensors are on the device given to `record`.
        stream: hidden states of all windows entering block 0.
        tail: norm and head.
        at: how blocks are called at other batch sizes than 1, for a model whose arguments do not
            broadcast; None for all others.
    """

    model: nn.Module
    names: tuple[str, ...]
    calls: tuple[BlockCall, ...]
    stream: Stream
    tail: Tail
    at: Callable[[int], tuple[BlockCall, ...]] | None = None

    def call_of(self, block_index: int, batch: int) -> BlockCall:
        """How a block is called with a batch of so many windows."""
        calls = self.calls if self.at is None or batch == 1 else self.at(batch)
        return calls[block_index]

    def block(self, index: int) -> nn.Module:
        """The module that stands in the model as block `index` now."""
        return get_module(self.model, self.names[index])

    def run(self, block_index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states after a block.

        Args:
            block_index: whose recorded arguments to use.
            module: the original block or a changed copy, on the device of `hidden`.
            hidden: states entering the block, (B, T, d), T as recorded.

        Raises:
            NonFiniteError: if the result holds NaN or infinity; names the block.
            ValueError: if T is not the recorded window length.
        """
        output = self.unchecked(block_index, module, hidden)
        check_finite_states(output, f"block {self.names[block_index]!r}")
        return output

    def unchecked(self, block_index: int, module: nn.Module, hidden: Tensor) -> Tensor:
        """As `run`, for training: its loss shows what is not finite, once for all blocks."""
        if hidden.shape[1] != self.stream.shape[1]:
            raise ValueError(
                f"windows have {hidden.shape[1]} tokens, recorded with {self.stream.shape[1]}"
            )
        return hidden_of(self.call_of(block_index, hidden.shape[0]).call(module, hidden))

    def advance(
        self, block_index: int, stream: Stream, batch: int, device: torch.device | str
    ) -> None:
        """Take a stream past a block as it stands in the model now, in place."""
        module = self.block(block_index)
        with evaluating(module):
            for rows in stream.batches(batch):
                stream.write(rows, self.run(block_index, module, stream.read(rows, device)))

    def finish(self, hidden: Tensor) -> Tensor:
        """Logits (B, T, vocabulary) from the states after the last block, all at once."""
        return self.tail.logits(hidden)


def _embed(model: nn.Module, first: nn.Module, name: str, ids: Tensor) -> Tensor:
    """Hidden states entering block 0, without running any block."""

    def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _EnteredFirstBlock(split_hidden(args, kwargs, name)[0])

    # In front of every other hook: none of them needs to prepare a block that will not run.
    handle = first.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        run_window(model, ids)
    except _EnteredFirstBlock as signal:
        return signal.hidden
    finally:
        handle.remove()
    raise ModelError(f"block {name!r} was not reached by a forward pass")


def _fill_stream(
    model: nn.Module, name: str, windows: Tensor, batch: int, folder: Path | str | None
) -> Stream:
    """Hidden states of all windows at the door of block 0."""
    first = get_module(model, name)
    stream: Stream | None = None
    for start in range(0, len(windows), batch):
        hidden = _embed(model, first, name, windows[start : start + batch])
        check_finite_states(hidden, "the embedding")
        if stream is None:
            n, t = windows.shape
            stream = Stream.empty(n, t, hidden.shape[2], hidden.dtype, folder)
        stream.write(slice(start, start + len(hidden)), hidden)
    assert stream is not None  # record() has refused an empty set of windows
    return stream


def record(
    model: nn.Module,
    windows: Tensor,
    *,
    batch: int,
    device: torch.device | str = HOST,
    anatomy: Anatomy | None = None,
    folder: Path | str | None = None,
) -> Replay:
    """Record how the model calls its blocks, and what enters block 0 for all windows.

    Args:
        model: the untouched model, on whatever device; it is left as it was.
        windows: token ids (N, T), int64, without padding.
        batch: windows per pass through the embedding.
        device: where the blocks will run; recorded masks and rotary embeddings are moved there.
        anatomy: the blocks; traced on a few tokens if not given.
        folder: where to memory-map the stream; in memory if not given.

    Raises:
        ModelError: the blocks are not chained directly, or need more than recorded arguments.
        NonFiniteError: the recorded window or an embedding is not finite; names the block.
        ValueError: no windows, or not of shape (N, T).
    """
    if windows.ndim != 2 or windows.shape[0] == 0 or windows.dtype != torch.int64:
        raise ValueError(
            f"windows are {tuple(windows.shape)} {windows.dtype}, expected (N, T) int64 with N > 0"
        )
    anatomy = anatomy or trace(model, windows[:1, :8])  # only the blocks' names are needed
    names = tuple(block.name for block in anatomy.blocks)
    with evaluating(model):
        visits, tail = observe(model, names, windows[:1])
        check_token_independent(model, names, visits, windows[:1])
        pair = bypassed(model, names, visits, windows[:1].expand(2, -1))
        stream = _fill_stream(model, names[0], windows, batch, folder)

    @lru_cache(maxsize=2)  # full batches, and the last one
    def at(count: int) -> tuple[BlockCall, ...]:
        with evaluating(model):
            own = bypassed(model, names, visits, windows[:1].expand(count, -1))
        return calls_of(own, visits, device)

    return Replay(
        model,
        names,
        calls_of(visits, visits, device),
        stream,
        tail,
        at if need_own_batch(visits, pair) else None,
    )
