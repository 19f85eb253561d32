"""Which weights decide where tokens go: those whose output something is chosen from by rank.

A router is known by what is done with its output and by nothing else: the number of experts of a
model is also the number of heads, of key-value channels or of filters of many others. One forward
pass is watched operation by operation. What a matrix multiplies is marked with its name; the mark
stays on what softmax, sigmoid, biases, masks, casts and views make of it, and is lost in the next
product. A top-k, sort or argmax over a marked tensor makes its weight a router, and so does a
maximum whose place is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

_aten = torch.ops.aten
_CHOOSING = {_aten.topk, _aten.sort, _aten.argsort, _aten.argmax, _aten.multinomial}
_KEEPING = {_aten.clone, _aten._to_copy, _aten._unsafe_view, _aten._softmax, _aten._log_softmax}


class Choices(TorchDispatchMode):
    """Watches a forward pass for weights whose output is chosen from.

    Attributes:
        routers: names of such weights, as `know` was given them.
    """

    def __init__(self):
        super().__init__()
        self.routers: set[str] = set()
        self._weights: Any = WeakTensorKeyDictionary()
        self._marks: Any = WeakTensorKeyDictionary()
        self._places: Any = WeakTensorKeyDictionary()

    def know(self, prefix: str, module: nn.Module) -> None:
        """Follow the matrices of a module from now on; `prefix` is its path."""
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                self._weights[parameter] = f"{prefix}.{name}"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Carry marks through one operation."""
        result = func(*args, **(kwargs or {}))
        operands = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, Tensor)]
        marked = [x for x in operands if x in self._marks]
        marks = frozenset().union(*(self._marks[x] for x in marked))
        weights = [self._weights[x] for x in operands if x in self._weights]
        packet = func.overloadpacket
        if packet in _CHOOSING:
            self.routers |= marks
        if packet is _aten.max and marks and isinstance(result, tuple):
            self._places[result[1]] = (
                marks  # of maxima: whether anybody asks for them is to be seen
            )
        for x in operands:
            self.routers |= self._places.get(x, frozenset())
        keeps = packet in _KEEPING or func.is_view or torch.Tag.pointwise in func.tags
        if keeps and len(operands) == 1 and weights:
            for out in _tensors(result):
                self._weights[out] = weights[0]  # a cast or another view of the same matrix
        elif not keeps:
            marks = frozenset(weights)
        if marks:
            # What was broadcast against something larger is no longer the output itself.
            largest = max(x.numel() for x in marked) if keeps else None
            for out in _tensors(result):
                if largest is None or out.numel() <= largest:
                    self._marks[out] = marks
        return result


def _tensors(result: Any) -> Iterator[Tensor]:
    for item in result if isinstance(result, (tuple, list)) else (result,):
        if isinstance(item, Tensor):
            yield item
