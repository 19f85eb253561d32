"""Choices of experts, written down in one forward pass and repeated or compared in another.

Moments of an expert in two streams are sums over pairs of the same token. Where the streams differ,
so do their routers' choices, and an expert would see other tokens in one than in the other. A first
pass writes its choices down, and the second repeats them with scores of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from spectrim.errors import ModelError


class Pins(TorchFunctionMode):
    """Choices by rank (`topk`, `max` along a dimension), written down or repeated in their order.

    with pins.writing(): ...   # first pass
    with pins.repeating(): ... # second pass, on other numbers

    Attributes:
        choices: indices that the first pass chose, in their order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.choices: list[Tensor] = []
        self._next: int | None = None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Forget what was chosen before, and write down what is chosen now."""
        self.choices, self._next = [], None
        with self:
            yield

    @contextmanager
    def repeating(self) -> Iterator[None]:
        """Choose what was chosen while writing."""
        self._next = 0
        with self:
            yield

    def __torch_function__(
        self, function: Any, _types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Watch for choices."""
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if name not in ("topk", "max") or not isinstance(result, tuple):
            return result
        if self._next is None:
            self.choices.append(result[1])
            return result
        chosen = self.choices[self._next] if self._next < len(self.choices) else None
        self._next += 1
        if chosen is None or chosen.shape != result[1].shape:
            raise ModelError(
                "a block chooses experts in another way on the shifted stream than on the original "
                "one; use a recipe that works on one stream (svd-llm, zs-svd)"
            )
        return type(result)((_picked(name, chosen, args, kwargs), chosen))


def _picked(name: str, chosen: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """The scores at other places than those of the largest."""
    place = 2 if name == "topk" else 1
    dimension = args[place] if len(args) > place else kwargs.get("dim", -1)
    scores = args[0]
    if chosen.ndim < scores.ndim:  # `max` without `keepdim`
        return scores.gather(dimension, chosen.unsqueeze(dimension)).squeeze(dimension)
    return scores.gather(dimension, chosen)


def same_choices(one: Tensor, other: Tensor) -> Tensor:
    """Whether tokens (..., k) are sent to the same experts, in whatever order, (...,) bool."""
    return (one.sort(-1).values == other.sort(-1).values).all(-1)
