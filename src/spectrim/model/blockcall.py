"""How a model calls one of its blocks: every argument besides the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectrim.errors import ModelError


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block.

    Attributes:
        args: positional arguments after the hidden states (or all, if those go by keyword).
        kwargs: keyword arguments without the hidden states.
        keyword: the keyword of the hidden states, or None where they come first by position.
        extras: how many more elements the block returns in a tuple; None where it returns a tensor.
    """

    args: tuple
    kwargs: dict[str, Any]
    keyword: str | None
    extras: int | None

    def call(self, module: Callable[..., Any], hidden: Tensor) -> Any:
        """Call a block with these arguments and other hidden states."""
        if self.keyword is None:
            return module(hidden, *self.args, **self.kwargs)
        return module(*self.args, **{self.keyword: hidden}, **self.kwargs)

    def dress(self, hidden: Tensor) -> Any:
        """Hidden states in the form in which the model expects them from this block."""
        return dressed(hidden, self.extras)


def dressed(hidden: Tensor, extras: int | None) -> Any:
    """Hidden states as a block returns them: alone, or in a tuple with so many more elements."""
    return hidden if extras is None else (hidden, *([None] * extras))


def split_hidden(args: tuple, kwargs: dict, name: str) -> tuple[Tensor, tuple, dict, str | None]:
    """Take the hidden states (B, T, d) out of a block's arguments."""
    if args and isinstance(args[0], Tensor) and args[0].ndim == 3:
        return args[0], args[1:], dict(kwargs), None
    hidden = kwargs.get("hidden_states")
    if isinstance(hidden, Tensor) and hidden.ndim == 3:
        rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        return hidden, args, rest, "hidden_states"
    raise ModelError(
        f"block {name!r} is not called with hidden states (B, T, d) first or as 'hidden_states'"
    )


def move_arguments(value: Any, device: torch.device | str, memo: dict[int, Tensor]) -> Any:
    """Arguments on `device`; a tensor that several blocks share is moved once."""
    if isinstance(value, Tensor):
        if id(value) not in memo:
            memo[id(value)] = value.detach().to(device)
        return memo[id(value)]
    if type(value) in (tuple, list):
        return type(value)(move_arguments(v, device, memo) for v in value)
    if type(value) is dict:
        return {k: move_arguments(v, device, memo) for k, v in value.items()}
    return value


def arguments_differ(one: Any, other: Any) -> bool:
    """Whether two recorded arguments hold different tensors."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape != other.shape or not torch.equal(one, other)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) != len(other) or any(map(arguments_differ, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() != other.keys() or any(arguments_differ(one[k], other[k]) for k in one)
    return isinstance(one, Tensor) != isinstance(other, Tensor)


def arguments_broadcast(one: Any, two: Any) -> bool:
    """Whether arguments recorded at batch size 1 can stand in for those at batch size 2."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape or (one.shape[:1] == (1,) and one.shape[1:] == two.shape[1:])
    if isinstance(one, (tuple, list)) and isinstance(two, (tuple, list)):
        return all(map(arguments_broadcast, one, two))
    if isinstance(one, dict) and isinstance(two, dict):
        return all(arguments_broadcast(one[k], two[k]) for k in one.keys() & two.keys())
    return True
