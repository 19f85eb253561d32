"""A module that stands where a 3-D parameter stood, and answers products with its slices.

`experts.gate_up_proj[e]` in the model's code is a handle; `F.linear(x, handle)`, `x @ handle`,
`torch.bmm` and `grouped_mm` reach it through torch's `__torch_function__` protocol and call the
linear layers of the experts that have tokens. Routing, activations, clamps, biases and routing
weights stay the model's own lines, whichever implementation of its experts is switched on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import ModelError
from spectrim.model.experts.handle import Handle
from spectrim.model.experts.layout import ExpertLayout
from spectrim.model.weights import new_linear


class GateUp(nn.Module):
    """The two matrices of one expert that the model keeps in one slice.

    Args:
        layout: how their outputs lie in the slice's output.
        gate: the first.
        up: the second; both read the same tokens.
    """

    def __init__(self, layout: ExpertLayout, gate: nn.Module, up: nn.Module):
        super().__init__()
        self.layout = layout
        self.gate = gate
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        """The slice's output (..., out)."""
        return self.layout.outputs((self.gate(x), self.up(x)))


class ExpertStack(nn.Module):
    """One linear layer per expert and matrix, in the place of a parameter (E, ...).

    Members are called `0` to `E-1`: linear layers, or `GateUp` with `gate` and `up` inside.

    Args:
        layout: of the parameter.
        members: of all experts, in order.

    Attributes:
        together: outputs (S, out) of tokens (S, in) that are sorted by expert, those of expert e
            before `offs[e]`, where all experts are multiplied at once (`serve/grouped.py`).
    """

    _is_hf_initialized = True
    """Nothing here waits for transformers' random numbers."""

    def __init__(self, layout: ExpertLayout, members: list[nn.Module]):
        super().__init__()
        self.layout = layout
        self.together: Callable[[Tensor, Tensor], Tensor] | None = None
        for number, member in enumerate(members):
            self.add_module(str(number), member)

    @classmethod
    def of(cls, parameter: Tensor, layout: ExpertLayout) -> ExpertStack:
        """Linear layers with the parameter's values, each in memory of its own."""
        members: list[nn.Module] = []
        for expert in range(layout.experts):
            linears = [
                _linear(W, parameter.requires_grad)
                for W in layout.split(parameter.detach(), expert)
            ]
            members.append(linears[0] if len(linears) == 1 else GateUp(layout, *linears))
        return cls(layout, members)

    def __len__(self) -> int:
        return self.layout.experts

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())  # type: ignore[arg-type]

    def run(self, expert: int, x: Tensor) -> Tensor:
        """One expert's output for tokens (..., in)."""
        return self._modules[str(expert)](x)  # type: ignore[misc]

    def folded(self) -> nn.Parameter:
        """The parameter that dense members came from.

        Raises:
            ModelError: a member is not dense.
        """
        slices = []
        for name, member in self._modules.items():
            linears = (member.gate, member.up) if isinstance(member, GateUp) else (member,)
            if not all(type(linear) is nn.Linear for linear in linears):
                raise ModelError(f"expert {name} is compressed: it has no slice of a parameter")
            slices.append(self.layout.joined(tuple(x.weight.detach() for x in linears)))  # type: ignore[union-attr]
        return nn.Parameter(torch.stack(slices))

    # What follows is what the model's code sees in the place of its parameter.

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return torch.Size(self.layout.shape)

    @property
    def ndim(self) -> int:
        """Of the parameter."""
        return 3

    @property
    def dtype(self) -> torch.dtype:
        """Of the members' numbers, as far as they are floating-point ones."""
        return next((t.dtype for t in self._tensors() if t.is_floating_point()), torch.float32)

    @property
    def device(self) -> torch.device:
        """Of the members."""
        return next(self._tensors()).device

    def _tensors(self) -> Iterator[Tensor]:
        yield from self.parameters()
        yield from self.buffers()

    def size(self, dim: int | None = None) -> Any:
        """Of the parameter."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """Of the parameter."""
        return 3

    def data_ptr(self) -> int:
        """Kernels ask whether this is aligned."""
        return 0

    def __getitem__(self, index: Any) -> Handle:
        return Handle(self)[index]

    def transpose(self, first: int, second: int) -> Handle:
        """The parameter with its last two dimensions exchanged."""
        return Handle(self).transpose(first, second)

    def permute(self, *order: int) -> Handle:
        """The parameter with its last two dimensions exchanged."""
        return Handle(self).permute(*order)

    @property
    def mT(self) -> Handle:
        """The parameter with its last two dimensions exchanged."""
        return Handle(self, flipped=True)

    @classmethod
    def __torch_function__(
        cls, function: Any, _types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Products with the whole parameter."""
        own = tuple(Handle(a) if isinstance(a, ExpertStack) else a for a in args)
        named = {
            k: Handle(v) if isinstance(v, ExpertStack) else v for k, v in (kwargs or {}).items()
        }
        return Handle.__torch_function__(function, (), own, named)


def _linear(W: Tensor, trainable: bool) -> nn.Linear:
    out_features, in_features = W.shape
    linear = new_linear(in_features, out_features, False)
    # `contiguous` would keep a slice of the parameter, and with it all of its memory.
    own = W if W.is_meta else W.clone(memory_format=torch.contiguous_format)
    linear.weight = nn.Parameter(own, requires_grad=trainable)
    return linear
