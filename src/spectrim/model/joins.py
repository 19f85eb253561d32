"""Which layers add their output to the residual stream, and where that stream can be read.

A decoder block adds what attention and MLP give to its hidden states: `z = h + y`, `y` the output
of a linear layer. Sums have no module, but what enters and leaves modules is seen: in one window
`y` is found to be added where some `h` that enters the block or one of its modules, plus `y`, is to
the bit what enters a later module or leaves the block. Where something stands between (a norm of
outputs, a factor, two branches added at once), nothing is found and nothing is assumed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.model.weights import is_linear


@dataclass
class _Visit:
    """What was seen of one member while it ran: inputs of modules, outputs of linears."""

    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)


class Joins:
    """Watches the members of lists of blocks in one forward pass.

    Attributes:
        found: linear -> path, inside its member, of the module whose input the linear's output is
            added to; empty for the input of the member itself.
    """

    def __init__(self) -> None:
        self.found: dict[nn.Module, str] = {}
        self._visits: list[_Visit] = []

    @contextmanager
    def watching(self, members: Collection[nn.Module]) -> Iterator[None]:
        """Hooks for the time of the context."""
        inside = {module for member in members for module in member.modules()}
        own = set(members)
        handles = []
        try:
            for module in inside:
                if module in own:
                    handles.append(module.register_forward_pre_hook(self._begin, prepend=True))
                    handles.append(module.register_forward_hook(self._end))
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                if is_linear(module):
                    handles.append(module.register_forward_hook(self._leave))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, _member: nn.Module, _args: tuple) -> None:
        self._visits.append(_Visit())

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        if x is not None and self._visits:
            self._visits[-1].inputs[module] = x

    def _leave(self, module: nn.Module, _args: tuple, output: Any) -> None:
        if isinstance(output, Tensor) and self._visits:
            self._visits[-1].outputs[module] = output

    def _end(self, member: nn.Module, _args: tuple, output: Any) -> None:
        visit = self._visits.pop()
        entering = visit.inputs.get(member)
        leaving = output[0] if isinstance(output, tuple) else output
        if entering is None or not isinstance(leaving, Tensor):
            return
        paths = {module: path for path, module in member.named_modules()}
        # Some architectures flatten (B, T, d) to (B T, d) on the way.
        stream = {m: _rows(x) for m, x in visit.inputs.items() if _alike(x, entering)}
        later = [*stream.values(), _rows(leaving)]
        for linear, y in visit.outputs.items():
            sums = {m: h + _rows(y) for m, h in stream.items() if _alike(y, entering)}
            joined = (m for m, total in sums.items() if any(torch.equal(total, z) for z in later))
            if (module := next(joined, None)) is not None:
                self.found[linear] = paths[module]


def _alike(x: Tensor, hidden: Tensor) -> bool:
    """Whether these are as many tokens of the same width."""
    return x.numel() == hidden.numel() and x.shape[-1] == hidden.shape[-1]


def _rows(x: Tensor) -> Tensor:
    """Tokens (B T, d)."""
    return x.reshape(-1, x.shape[-1])
