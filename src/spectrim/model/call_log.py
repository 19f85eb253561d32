"""What one forward pass does: which modules run, in which order, on which tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from spectrim.model.routing import Choices
from spectrim.tolerances import SAME_FUNCTION


@dataclass(frozen=True)
class Call:
    """One call of a linear: its input (None unless exactly one tensor) and that input's version.

    The tensor is kept alive, so that no later tensor can take over its memory and look the same.
    """

    module: nn.Module
    tensor: Tensor | None
    version: int

    def same_input(self, other: Call) -> bool:
        """Same tensor, or another view that holds the same rows of the same memory."""
        x, y = self.tensor, other.tensor
        if x is None or y is None or self.version != other.version:
            return False
        if x is y:
            return True
        if x.data_ptr() != y.data_ptr() or x.dtype != y.dtype or x.shape[-1] != y.shape[-1]:
            return False
        if x.shape == y.shape:
            return x.stride() == y.stride()
        return x.numel() == y.numel() and x.is_contiguous() and y.is_contiguous()


@dataclass
class CallLog:
    """What one forward pass did: entries and exits of list members, calls of linears."""

    members: dict[nn.Module, str]
    choices: Choices = field(default_factory=Choices)
    steps: list[tuple[nn.Module, bool]] = field(default_factory=list)
    calls: dict[nn.Module, list[Call]] = field(default_factory=lambda: defaultdict(list))
    order: list[Call] = field(default_factory=list)
    odd: set[nn.Module] = field(default_factory=set)

    def enter(self, module: nn.Module, _args: tuple) -> None:
        """A list member begins."""
        # Only now: the weights of a block may just have been loaded.
        self.choices.know(self.members[module], module)
        self.steps.append((module, True))

    def leave(self, module: nn.Module, _args: tuple, _output: object) -> None:
        """A list member has ended."""
        self.steps.append((module, False))

    def call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A linear is called."""
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        tensor = args[0] if alone else None
        # The version counts in-place changes: same tensor, other content, is another input.
        call = Call(module, tensor, -1 if tensor is None else tensor._version)
        self.calls[module].append(call)
        self.order.append(call)

    def compare(self, module: nn.Module, args: tuple, output: object) -> None:
        """Whether a class of its own computes what a linear layer with its weight computes."""
        x, expected = args[0] if args else None, None
        if isinstance(x, Tensor) and x.shape[-1] == module.weight.shape[1]:  # type: ignore[index,union-attr]
            expected = nn.functional.linear(x, module.weight, module.bias)  # type: ignore[arg-type]
        same = (
            expected is not None
            and isinstance(output, Tensor)
            and output.shape == expected.shape
            and (output - expected).norm() <= SAME_FUNCTION * expected.norm()
        )
        if not same:
            self.odd.add(module)


def odd_class(module: nn.Module) -> str:
    """Why a linear that was found odd is no target."""
    return f"a {type(module).__name__} computes something else than a linear layer"


@contextmanager
def watching(log: CallLog, linears: list[nn.Module]) -> Iterator[None]:
    """Hooks on the log's list members and on some linears, for the time of the context."""
    handles = []
    try:
        for module in log.members:
            handles.append(module.register_forward_pre_hook(log.enter))
            handles.append(module.register_forward_hook(log.leave))
        for module in linears:
            handles.append(module.register_forward_pre_hook(log.call, with_kwargs=True))
            if type(module) not in (nn.Linear, Conv1D):
                handles.append(module.register_forward_hook(log.compare))
        with log.choices:
            yield
    finally:
        for handle in handles:
            handle.remove()


def grouped(calls: list[Call]) -> list[list[Call]]:
    """Calls with the same input together; both levels in execution order."""
    groups: list[list[Call]] = []
    for call in calls:
        home = next((g for g in groups if g[0].same_input(call)), None)
        if home is None:
            groups.append([call])
        else:
            home.append(call)
    return groups
