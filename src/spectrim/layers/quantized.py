"""Linear layers whose matrix is stored as 8-bit or 4-bit integers: `y = W x + b`.

`QuantizedLinear` stands in for the `nn.Linear` parts of a compressed layer (`up`, `down`, `basis`,
`coefficients`); `QuantizedDense` wraps one for a whole target that was not cut. The numbers are
those of `linalg/rounding.py`, stored as plain integer tensors beside their scales.

int8 multiplies the codes themselves and scales the result, which is exact up to the arithmetic of
the product; torch's int8 kernel does it without a copy of the matrix where it is fast (bf16 on a
CPU, sides that are multiples of 16). int4 restores the matrix for every product. Scales keep their
dtype whatever the model is cast to: they are part of the stored numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.layers.layout import INT4_GROUP, layout_of, matrix_tensors
from spectrim.linalg.rounding import from_int4, from_int8, to_int4, to_int8

__all__ = [
    "QuantizedDense",
    "QuantizedLinear",
    "quantize_layer",
    "rounded",
    "skeleton",
    "wide_weight",
]

KERNEL_MULTIPLE = 16
"""Both sides of a matrix that torch's int8 kernel multiplies are multiples of this."""

_HAS_KERNEL = hasattr(torch, "_weight_int8pack_mm")
_DTYPES = {"int8": torch.int8, "uint8": torch.uint8, "fp32": torch.float32, "bf16": torch.bfloat16}


class QuantizedLinear(nn.Module):
    """A linear layer with integer weights.

    Attributes:
        codes: int8 (out, in), or two 4-bit codes per uint8 byte (out, groups * 16).
        scale: fp32 (out,) for int8, bf16 (out, groups) for int4.
        zero: bf16 (out, groups), int4 only.
        bias: (out,) or None.
        weights: `int8` or `int4`.
        dtype: of the model around it, in which `weight` is given.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        weights: str,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weights = weights
        self.dtype = dtype or torch.get_default_dtype()
        for name, (shape, number) in matrix_tensors(out_features, in_features, weights).items():
            self.register_buffer(name, torch.zeros(shape, dtype=_DTYPES[number], device=device))
        self.bias = (
            nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        )

    @classmethod
    def from_weight(
        cls, W: Tensor, bias: Tensor | None, weights: str, *, dtype: torch.dtype
    ) -> QuantizedLinear:
        """Round `W` (out, in) of any floating dtype; the bias is rounded to `dtype`."""
        layer = cls(
            W.shape[1], W.shape[0], weights, bias=bias is not None, device="meta", dtype=dtype
        )
        for name, tensor in _round(W.detach(), weights).items():
            setattr(layer, name, tensor.contiguous())
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().to(W.device, dtype, copy=True))
        return layer

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in), restored in the model's dtype."""
        return self.wide_weight().to(self.dtype)

    def wide_weight(self) -> Tensor:
        """The matrix (out, in) in fp32, without further rounding."""
        if self.weights == "int8":
            return from_int8(self.codes, self.scale)
        return from_int4(self.codes, self.scale, self.zero, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.weights == "int4":
            return nn.functional.linear(x, self.wide_weight().to(x.dtype), self.bias)
        if _suits_kernel(x, self.codes):
            # Scales of one: the kernel would round ours to bf16, one error for a whole row.
            ones = torch.ones_like(self.scale, dtype=x.dtype)
            y = torch._weight_int8pack_mm(x.reshape(-1, self.in_features), self.codes, ones)
            y = y.view(*x.shape[:-1], self.out_features)
        else:
            y = nn.functional.linear(x, self.codes.to(x.dtype))
        y = (y * self.scale).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weights={self.weights}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move and cast, but for the dtype of the scales; the model's dtype is noted."""
        before = {name: t for name, t in self._buffers.items() if t is not None}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            now = getattr(self, name)
            if now.dtype != tensor.dtype:
                setattr(self, name, tensor.to(now.device))
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return self


class QuantizedDense(nn.Module):
    """A target that was not cut, with integer weights.

    Attributes:
        inner: the layer itself.
        rank: None, nothing was cut.
        transposed: True where it replaced a module that stores (in, out), transformers' `Conv1D`.
    """

    is_compressed_layer = True
    storage = "dense"
    rank = None

    def __init__(self, inner: QuantizedLinear):
        super().__init__()
        self.inner = inner
        self.in_features = inner.in_features
        self.out_features = inner.out_features
        self.weights = inner.weights
        self.transposed = False

    @property
    def weight(self) -> Tensor:
        """The matrix, restored: a device and dtype probe for code that asks a linear layer."""
        return self.inner.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.inner.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.inner(x)

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix that the layer stands for, in fp32."""
        return self.inner.wide_weight()


def _round(W: Tensor, weights: str) -> dict[str, Tensor]:
    if weights == "int8":
        return dict(zip(("codes", "scale"), to_int8(W), strict=True))
    return dict(zip(("codes", "scale", "zero"), to_int4(W, INT4_GROUP), strict=True))


def rounded(W: Tensor, weights: str, dtype: torch.dtype) -> Tensor:
    """`W` as it comes back from storage, fp64: `native` is a rounding to `dtype`."""
    if weights == "native":
        return W.to(dtype).to(torch.float64)
    return QuantizedLinear.from_weight(W, None, weights, dtype=dtype).wide_weight().double()


def wide_weight(linear: nn.Module) -> Tensor:
    """The weight of a linear part in fp32 or better, however it is stored."""
    restore: Any = getattr(linear, "wide_weight", None)
    if restore is not None:  # integers, in whatever order they lie
        return restore()
    weight: Any = linear.weight
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32))


def quantize_layer(layer: Any, weights: str, *, dtype: torch.dtype) -> Any:
    """Round every matrix of a compressed layer with native numbers, in place; returns the layer.

    The bias is rounded to `dtype`.
    """
    for path in layout_of(layer.storage).matrices(2, 2, 1):
        part = path.removesuffix(".weight")
        old: Any = layer.get_submodule(part)
        new = QuantizedLinear.from_weight(old.weight, old.bias, weights, dtype=dtype)
        setattr(layer, part, new.train(layer.training))
    if layer.bias is not None:
        layer.bias.data = layer.bias.data.to(dtype)
    layer.weights = weights
    return layer


def skeleton(
    storage: str,
    weights: str,
    shape: tuple[int, int],
    rank: int | None,
    *,
    bias: bool,
    dtype: torch.dtype,
) -> Any:
    """A compressed layer on the meta device, ready to be loaded into.

    Args:
        storage: `factored`, `packed`, or `dense` with integer weights.
        weights: number format.
        shape: (out, in).
        rank: None for dense storage and only for it.
        bias: whether it has one.
        dtype: of native numbers and of the bias.
    """
    m, n = shape
    if storage == "dense":
        return QuantizedDense(QuantizedLinear(n, m, weights, bias=bias, device="meta", dtype=dtype))
    layer = layout_of(storage).layer_class().empty(n, m, rank, bias, dtype=dtype)
    if weights == "native":
        return layer
    for path in layout_of(storage).matrices(2, 2, 1):
        part = path.removesuffix(".weight")
        old = layer.get_submodule(part)
        new = QuantizedLinear(
            old.in_features,
            old.out_features,
            weights,
            bias=old.bias is not None,
            device="meta",
            dtype=dtype,
        )
        setattr(layer, part, new)
    layer.weights = weights
    return layer


def _suits_kernel(x: Tensor, codes: Tensor) -> bool:
    """Whether torch's int8 kernel is at hand and beats a product with restored numbers.

    It does in bf16 on a CPU; in fp32 it is tens of times slower. It has no gradient, and with
    sides that are no multiples of 16 it was seen to read beyond its memory.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or x.requires_grad:
        return False
    return all(side % KERNEL_MULTIPLE == 0 for side in codes.shape) and _HAS_KERNEL
