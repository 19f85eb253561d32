"""Run a decoder block by block with the arguments that a real forward pass gave its blocks.

One window goes through the whole model and leaves, for every block, all arguments besides the
hidden states: masks, rotary embeddings, whatever the architecture passes, different from layer to
layer where the model says so. Recorded at batch size 1, they broadcast over any batch. For all
windows only the embedding runs, up to the door of block 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.devices import HOST
from spectrim.errors import ModelError, NonFiniteError
from spectrim.model.anatomy import Anatomy
from spectrim.model.blockcall import BlockCall, arguments_differ, move_arguments, split_hidden
from spectrim.model.capture import capture_inputs
from spectrim.model.forward import (
    evaluating,
    forwards_replaced,
    hidden_of,
    run_window,
)
from spectrim.model.stream import Stream
from spectrim.model.tail import PROBED_TOKENS, Tail
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module

__all__ = ["BlockCall", "Replay", "Stream", "capture_inputs", "record"]


def _check_finite(hidden: Tensor, where: str) -> None:
    finite = torch.isfinite(hidden)
    if not finite.all():
        rows = (~finite).flatten(1).any(1).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"{where} gives NaN or infinite hidden states, in window(s) {rows[:8]} of the batch of "
            f"{hidden.shape[0]}; try --dtype float32, or look for broken weights in this block"
        )


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
    """

    model: nn.Module
    names: tuple[str, ...]
    calls: tuple[BlockCall, ...]
    stream: Stream
    tail: Tail

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
        if hidden.shape[1] != self.stream.shape[1]:
            raise ValueError(
                f"windows have {hidden.shape[1]} tokens, recorded with {self.stream.shape[1]}"
            )
        output = hidden_of(self.calls[block_index].call(module, hidden))
        _check_finite(output, f"block {self.names[block_index]!r}")
        return output

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


@dataclass
class _Visit:
    """How one block was called during the recorded pass."""

    args: tuple
    kwargs: dict
    keyword: str | None
    extras: int | None = None

    def call(self) -> BlockCall:
        """The call as a record."""
        return BlockCall(self.args, self.kwargs, self.keyword, self.extras)


def _visit(args: tuple, kwargs: dict, name: str) -> tuple[Tensor, _Visit]:
    hidden, rest, named, keyword = split_hidden(args, kwargs, name)
    return hidden, _Visit(rest, named, keyword)


def _observe(model: nn.Module, names: Sequence[str], window: Tensor) -> tuple[list[_Visit], Tail]:
    """A real forward pass of one window (1, T) that notes every block's arguments.

    Its logits are taken of the first tokens only, where the head is a module.
    """
    visits: list[_Visit] = []
    unchained: list[int] = []
    handles = []
    # Only the states between two blocks are held: a deep model's together can be larger than it.
    latest: dict[str, Any] = {}

    def enter(index: int, args: tuple, kwargs: dict) -> None:
        hidden, visit = _visit(args, kwargs, names[index])
        if index and not torch.equal(latest["output"], hidden):
            unchained.append(index)
        latest["shape"] = hidden.shape
        visits.append(visit)

    def leave(index: int, output: Any) -> None:
        result = hidden_of(output)
        if not isinstance(result, Tensor) or result.shape != latest["shape"]:
            raise ModelError(
                f"block {names[index]!r} does not return hidden states of the shape it got"
            )
        _check_finite(result, f"block {names[index]!r}")
        latest["output"] = result
        visits[index].extras = len(output) - 1 if isinstance(output, tuple) else None

    try:
        for i, name in enumerate(names):
            block = get_module(model, name)
            handles.append(
                block.register_forward_pre_hook(
                    lambda _m, a, k, i=i: enter(i, a, k), with_kwargs=True
                )
            )
            handles.append(block.register_forward_hook(lambda _m, _a, o, i=i: leave(i, o)))
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        if head is not None:
            handles.append(head.register_forward_pre_hook(lambda _m, a: (a[0][:, :PROBED_TOKENS],)))
        logits = run_window(model, window).logits
    finally:
        for handle in handles:
            handle.remove()
    if unchained:
        i = unchained[0]
        raise ModelError(
            f"the model changes the hidden states between {names[i - 1]!r} and {names[i]!r}; "
            "spectrim can only follow models whose blocks are chained directly"
        )
    tokens = slice(PROBED_TOKENS)
    extras = [visit.extras for visit in visits]
    return visits, Tail(model, names, extras, latest["output"][:, tokens], logits[:, tokens])


def _check_token_independent(
    model: nn.Module, names: Sequence[str], visits: list[_Visit], window: Tensor
) -> None:
    """Refuse models whose block arguments depend on the tokens: replaying them would be wrong."""
    again: list[_Visit] = []

    def bypass(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, visit = _visit(args, kwargs, names[index])
            again.append(visit)
            return visits[index].call().dress(hidden)

        return forward

    with forwards_replaced([get_module(model, name) for name in names], bypass):
        run_window(model, window.flip(1))
    for name, one, other in zip(names, visits, again, strict=True):
        if arguments_differ((one.args, one.kwargs), (other.args, other.kwargs)):
            raise ModelError(
                f"block {name!r} gets arguments that depend on the tokens besides its hidden "
                "states; spectrim cannot replay this architecture"
            )


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
        _check_finite(hidden, "the embedding")
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
        visits, tail = _observe(model, names, windows[:1])
        _check_token_independent(model, names, visits, windows[:1])
        stream = _fill_stream(model, names[0], windows, batch, folder)
    memo: dict[int, Tensor] = {}
    calls = tuple(
        BlockCall(
            args=move_arguments(v.args, device, memo),
            kwargs=move_arguments(v.kwargs, device, memo),
            keyword=v.keyword,
            extras=v.extras,
        )
        for v in visits
    )
    return Replay(model, names, calls, stream, tail)
