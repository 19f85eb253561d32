"""How a model calls its blocks: seen in a real forward pass, or with the blocks bypassed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import ModelError, NonFiniteError
from spectrim.model.blockcall import (
    BlockCall,
    arguments_broadcast,
    arguments_differ,
    move_arguments,
    split_hidden,
)
from spectrim.model.forward import forwards_replaced, hidden_of, run_window
from spectrim.model.tail import PROBED_TOKENS, Tail
from spectrim.model.weights import get_module


def check_finite_states(hidden: Tensor, where: str) -> None:
    """Refuse NaN and infinity; names the windows."""
    hidden = hidden.detach()
    # A sum is not finite if one value is not, and is one pass, which runs once per block and batch.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if math.isfinite(float(hidden.sum(dtype=wide))):
        return
    finite = torch.isfinite(hidden)
    if not finite.all():
        rows = (~finite).flatten(1).any(1).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"{where} gives NaN or infinite hidden states, in window(s) {rows[:8]} of the batch of "
            f"{hidden.shape[0]}; try --dtype float32, or look for broken weights in this block"
        )


@dataclass
class Visit:
    """How one block was called during the recorded pass."""

    args: tuple
    kwargs: dict
    keyword: str | None
    extras: int | None = None

    def call(self) -> BlockCall:
        """The call as a record."""
        return BlockCall(self.args, self.kwargs, self.keyword, self.extras)


def _visit(args: tuple, kwargs: dict, name: str) -> tuple[Tensor, Visit]:
    hidden, rest, named, keyword = split_hidden(args, kwargs, name)
    return hidden, Visit(rest, named, keyword)


def observe(model: nn.Module, names: Sequence[str], window: Tensor) -> tuple[list[Visit], Tail]:
    """A real forward pass of one window (1, T) that notes every block's arguments.

    Its logits are taken of the first tokens only, where the head is a module.
    """
    visits: list[Visit] = []
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
        check_finite_states(result, f"block {names[index]!r}")
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


def bypassed(
    model: nn.Module, names: Sequence[str], visits: list[Visit], windows: Tensor
) -> list[Visit]:
    """How the blocks are called for other windows, without running them."""
    again: list[Visit] = []

    def bypass(index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, visit = _visit(args, kwargs, names[index])
            again.append(visit)
            return visits[index].call().dress(hidden)

        return forward

    with forwards_replaced([get_module(model, name) for name in names], bypass):
        run_window(model, windows)
    return again


def check_token_independent(
    model: nn.Module, names: Sequence[str], visits: list[Visit], window: Tensor
) -> None:
    """Refuse models whose block arguments depend on the tokens: replaying them would be wrong."""
    again = bypassed(model, names, visits, window.flip(1))
    for name, one, other in zip(names, visits, again, strict=True):
        if arguments_differ((one.args, one.kwargs), (other.args, other.kwargs)):
            raise ModelError(
                f"block {name!r} gets arguments that depend on the tokens besides its hidden "
                "states; spectrim cannot replay this architecture"
            )


def calls_of(
    visits: list[Visit], first: list[Visit], device: torch.device | str
) -> tuple[BlockCall, ...]:
    """Visits as records; `first` are those that saw what the blocks return."""
    memo: dict[int, Tensor] = {}
    return tuple(
        BlockCall(
            args=move_arguments(v.args, device, memo),
            kwargs=move_arguments(v.kwargs, device, memo),
            keyword=v.keyword,
            extras=known.extras,
        )
        for v, known in zip(visits, first, strict=True)
    )


def need_own_batch(one: Sequence[Visit], two: Sequence[Visit]) -> bool:
    """Whether what was recorded at batch size 1 does not broadcast to batch size 2."""
    return not all(
        arguments_broadcast((a.args, a.kwargs), (b.args, b.kwargs))
        for a, b in zip(one, two, strict=True)
    )
