"""Find the parameters that hold experts, and how, by watching one window go through the model.

A parameter of three dimensions that belongs to no linear layer may hold one matrix per expert. What
the model does with it says so: slices of it, or all of it, multiply tokens. The side from which
they do gives the orientation; what happens to the product says whether two matrices lie in one
slice, one after the other (`chunk`) or in turn (`[..., ::2]`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from spectrim.model.experts.layout import ExpertLayout, Parts
from spectrim.model.forward import evaluating, run_window
from spectrim.model.weights import get_module, is_linear


@dataclass
class _Seen:
    """What is known of one parameter: whether products had its slices as (in, out), its parts."""

    transposed: bool | None = None
    contradicting: bool = False
    parts: Parts | None = None


@dataclass(frozen=True)
class _Slice:
    """A tensor that is a parameter, slices of it, or one of those turned round."""

    name: str
    flipped: bool


class _Watch(TorchFunctionMode):
    """Follows some parameters through a forward pass, to their products and what splits these."""

    def __init__(self, names: Iterable[str]):
        super().__init__()
        self.seen = {name: _Seen() for name in names}
        # With the tensors themselves, so that no later one takes over an id.
        self._weights: dict[int, tuple[_Slice, Tensor]] = {}
        self._products: dict[int, tuple[str, Tensor]] = {}

    @contextmanager
    def entering(self, model: nn.Module) -> Iterator[None]:
        """Follow the parameters as they are when their modules are called.

        A block that is read from files gets its parameters only then, and loses them after.
        """
        handles = []
        try:
            for name in self.seen:
                path, _, leaf = name.rpartition(".")

                def know(module: nn.Module, _args: Any, name: str = name, leaf: str = leaf) -> None:
                    self._follow_weight(module.get_parameter(leaf), _Slice(name, False))

                def forget(*_: Any, name: str = name) -> None:
                    seen = [
                        key for key, (slice_, _) in self._weights.items() if slice_.name == name
                    ]
                    for key in seen:
                        del self._weights[key]

                owner = get_module(model, path)
                handles.append(owner.register_forward_pre_hook(know))
                handles.append(owner.register_forward_hook(forget))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_function__(
        self, function: Any, _types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Note what is done with what is followed."""
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        operands = [*args, *(kwargs or {}).values()]
        for place, operand in enumerate(operands):
            if id(operand) in self._weights:
                self._on_weight(name, self._weights[id(operand)][0], place, operand, args, result)
            elif id(operand) in self._products and place == 0:
                self._on_product(
                    name, self._products[id(operand)][0], operand, args, kwargs or {}, result
                )
        return result

    def _follow_weight(self, tensor: Tensor, slice_: _Slice) -> None:
        self._weights[id(tensor)] = slice_, tensor

    def _follow_product(self, tensor: Any, parameter: str) -> None:
        if isinstance(tensor, Tensor):
            self._products[id(tensor)] = parameter, tensor

    def _on_weight(
        self, name: str, found: _Slice, place: int, weight: Tensor, args: tuple, result: Any
    ) -> None:
        if name in _TURNING or name in _KEEPING:
            if isinstance(result, Tensor) and result.ndim >= 2:
                turned = name in _TURNING and result.shape != weight.shape
                # A square matrix that is turned looks as before; the function says that it was.
                turned |= name in _TURNING and result.stride() != weight.stride()
                self._follow_weight(result, _Slice(found.name, found.flipped != turned))
            return
        if name in _PRODUCTS and isinstance(result, Tensor):
            on_the_left = name in _TWO_SIDED and place == 0
            rows_are_outputs = name == "linear" or on_the_left
            seen = self.seen[found.name]
            transposed = rows_are_outputs == found.flipped
            seen.contradicting |= seen.transposed not in (None, transposed)
            seen.transposed = transposed
            self._follow_product(result, found.name)

    def _on_product(
        self, name: str, parameter: str, product: Tensor, args: tuple, kwargs: dict, result: Any
    ) -> None:
        if name in _PASSING_ON:
            self._follow_product(result, parameter)
            return
        parts: Parts = "whole"
        if name in ("chunk", "split", "tensor_split", "unsafe_chunk"):
            last = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) in (-1, product.ndim - 1)
            halves = len(result) == 2 and result[0].shape == result[1].shape
            parts = "stacked" if last and halves else "whole"
        elif name == "__getitem__":
            along = args[1][-1] if isinstance(args[1], tuple) else args[1]
            if isinstance(along, slice) and product.shape[-1] == 2 * result.shape[-1]:
                parts = "interleaved" if along.step == 2 else "stacked"
            elif isinstance(result, Tensor) and result.shape[-1] == product.shape[-1]:
                self._follow_product(result, parameter)  # other rows, the same outputs
                return
        seen = self.seen[parameter]
        if seen.parts is None or parts != "whole":
            seen.parts = parts


_TURNING = {"transpose", "swapaxes", "permute", "t", "__get__"}
_KEEPING = {"__getitem__", "to", "contiguous", "index_select", "type_as", "float", "squeeze"}
_KEEPING |= {"view", "reshape", "detach", "clone"}
_TWO_SIDED = {"bmm", "matmul", "mm", "__matmul__"}
_PRODUCTS = {"linear", "grouped_mm", "_grouped_mm", "grouped_mm_fallback", *_TWO_SIDED}
_PASSING_ON = {"add", "__add__", "add_", "__iadd__", "__radd__", "squeeze", "to", "contiguous"}
_PASSING_ON |= {"view", "reshape", "masked_fill", "masked_fill_", "type_as", "float", "mT"}


def candidates(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of three dimensions that are no linear layer's and hold matrices."""
    found = {}
    for path, module in model.named_modules():
        if is_linear(module) or isinstance(module, nn.modules.conv._ConvNd):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape[1:]) > 1:
                found[f"{path}.{leaf}" if path else leaf] = parameter
    return found


def find_experts(
    model: nn.Module, window: Tensor, *, run: Callable[[nn.Module, Tensor], Any] = run_window
) -> tuple[dict[str, ExpertLayout], dict[str, str]]:
    """Which parameters hold experts, and why the other candidates do not.

    Args:
        model: any decoder; it is left as it is.
        window: token ids (1, T).
        run: runs the model on the window.

    Returns:
        Parameter name -> layout, and parameter name -> reason.
    """
    parameters = candidates(model)
    if not parameters:
        return {}, {}
    watch = _Watch(parameters)
    with evaluating(model), watch.entering(model), watch:
        run(model, window)
    found: dict[str, ExpertLayout] = {}
    reasons: dict[str, str] = {}
    for name, parameter in parameters.items():
        seen = watch.seen[name]
        if seen.transposed is None:
            reasons[name] = "its slices multiply no tokens on the traced window"
        elif seen.contradicting:
            reasons[name] = "its slices multiply tokens in both orientations"
        else:
            experts, rows, columns = parameter.shape
            out_features, in_features = (columns, rows) if seen.transposed else (rows, columns)
            parts = seen.parts or "whole"
            found[name] = ExpertLayout(experts, out_features, in_features, seen.transposed, parts)
    return found, reasons
