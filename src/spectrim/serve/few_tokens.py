"""Compressed layers whose products of a few tokens are one or two launches, shared with company.

The classes add no tensor and change no name: a layer becomes one of them and is the same layer in
every other respect. With many tokens, with gradients, and where another module stands for a part,
the ordinary operators run; integers are then restored by a kernel, once per product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.devices import has_triton, runs_triton
from spectrim.layers.dense import QuantizedDense
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import QuantizedLinear
from spectrim.serve.once import OncePerInput
from spectrim.serve.product import MOST, Product, product_of, steps

FEW = 8
"""Tokens up to which every weight is read once per token from a cache; above it products of
matrices are better at it."""


def obstacle(device: torch.device) -> str:
    """Why the kernels cannot run on a device, empty if they can."""
    if not has_triton():
        return "Triton is not installed"
    return "" if runs_triton(device) else f"Triton makes no kernels for {device.type} here"


class Together:
    """Layers that read one input: their first products are one launch, their second ones another.

    Args:
        layers: at most `MOST`, each of which becomes quick.
    """

    def __init__(self, layers: Sequence[Any]):
        self.layers = tuple(layers)
        self._once = OncePerInput(len(layers))
        for member, layer in enumerate(layers):
            layer.__class__ = _QUICK[type(layer)]
            layer.together, layer.member = self, member

    def take(self, x: Tensor, member: int) -> Tensor | None:
        """A member's output (..., out) for few tokens (..., in), None where no kernel gives it."""
        if torch.is_grad_enabled() or not 0 < x.numel() <= FEW * x.shape[-1]:
            return None
        ys = self._once.take(x, member, self._outputs)
        return None if ys is None else ys[member]

    def _outputs(self, x: Tensor) -> list[Tensor] | None:
        found: list[Any] = [steps(layer) for layer in self.layers]
        if not all(_fit(turn, x.dtype) for turn in found):
            return None
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        ys = _launch([rows] * len(found), [turn[0] for turn in found])
        second = [i for i, turn in enumerate(found) if len(turn) > 1]
        if second:
            last = iter(_launch([ys[i] for i in second], [found[i][1] for i in second]))
            ys = [next(last) if i in second else y for i, y in enumerate(ys)]
        return [y.view(*x.shape[:-1], y.shape[-1]) for y in ys]

    def undo(self) -> None:
        """The layers are what they were."""
        for layer in self.layers:
            layer.__class__ = type(layer).__bases__[1]
            del layer.together, layer.member


class _Quick(nn.Module):
    """A layer that asks its company for the output of a few tokens."""

    together: Together
    member: int

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.together.take(x, self.member)
        return super().forward(x) if y is None else y


class QuickLowRank(_Quick, LowRankLinear):
    """`LowRankLinear` with two launches for a few tokens."""


class QuickPacked(_Quick, PackedLinear):
    """`PackedLinear` with two launches for a few tokens: its order is read, nothing is gathered."""


class QuickDense(_Quick, QuantizedDense):
    """`QuantizedDense` with one launch for a few tokens, its codes read as they are stored."""


class QuickCodes(QuantizedLinear):
    """`QuantizedLinear` whose matrix is restored in one launch for many tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if x.requires_grad and torch.is_grad_enabled():
            return super().forward(x)
        weight = _restored(product_of(self), x.dtype)
        return nn.functional.linear(x, weight, self.bias)


_QUICK: dict[type, type] = {
    LowRankLinear: QuickLowRank,
    PackedLinear: QuickPacked,
    QuantizedDense: QuickDense,
}


def fits(layer: nn.Module, dtype: torch.dtype) -> bool:
    """Whether the kernel multiplies every part of a compressed layer."""
    return _fit(steps(layer), dtype)


def _fit(turn: Iterable[Product | None], dtype: torch.dtype) -> bool:
    return all(step is not None and step.fits(dtype) for step in turn)


def quick_codes(model: nn.Module) -> None:
    """Let every integer matrix of a model be restored by the kernel, in place."""
    for module in model.modules():
        if type(module) is QuantizedLinear and module.format.integer:
            module.__class__ = QuickCodes


def companies(
    layers: dict[str, nn.Module], groups: Iterable[Sequence[str]]
) -> list[tuple[str, ...]]:
    """Names of layers that share launches: those that read one input, and every other alone.

    Args:
        layers: those that can be quick, by name.
        groups: names of layers that read the same input.
    """
    found: list[tuple[str, ...]] = []
    for group in groups:
        known = [name for name in group if name in layers]
        found += [tuple(known[i : i + MOST]) for i in range(0, len(known), MOST)]
    alone = set(layers).difference(*found)
    return found + [(name,) for name in layers if name in alone]


def _launch(xs: list[Tensor], products: list[Product]) -> list[Tensor]:
    from spectrim.serve import triton_products

    if not torch.compiler.is_compiling():
        return triton_products.launch(xs, products)
    fields = [list(field) for field in zip(*products, strict=True)]
    return triton_products.products(xs, *fields)


def _restored(product: Product | None, dtype: torch.dtype) -> Tensor:
    from spectrim.serve import triton_restoring

    assert product is not None
    if not torch.compiler.is_compiling():
        return triton_restoring.restored(product, dtype)
    return triton_restoring.matrix(
        product.weight, product.scale, product.zero, product.bits, product.columns, dtype
    )
