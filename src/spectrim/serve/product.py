"""What a kernel for few tokens is told about a product, read off a compressed layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from spectrim.formats.number_format import CODED
from spectrim.layers.dense import QuantizedDense
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import QuantizedLinear
from spectrim.serve.fusion import FusedSlice

PLAIN, INSIDE, OUTSIDE = 0, 1, 2
"""`W x`; `x_p + W x_n` with `[x_p; x_n] = x[order]`; `[x; W x][order]`."""

MOST = 3
"""Products of one launch: q, k and v."""

NATIVE = 16
"""Stands for the bits of weights that are no codes, whatever their dtype."""


class Product(NamedTuple):
    """One product of a launch.

    Attributes:
        weight: (rows, columns) in the dtype of x, or codes as they are stored, in bytes.
        scale: of codes, (rows,) or (rows, groups); None for plain weights.
        zero: bf16 (rows, groups), or None.
        order: int32, of a packed layer; None for a plain product.
        bias: (out,) or None.
        rank: pivots of a packed layer; 0 for a plain product.
        mode: `PLAIN`, `INSIDE` or `OUTSIDE`.
        bits: of a code, or `NATIVE`.
        columns: of the matrix, without padding.
    """

    weight: Tensor
    scale: Tensor | None
    zero: Tensor | None
    order: Tensor | None
    bias: Tensor | None
    rank: int
    mode: int
    bits: int
    columns: int

    @property
    def out(self) -> int:
        """Numbers per token that come out."""
        if self.mode != OUTSIDE:
            return self.weight.shape[0]
        assert self.order is not None
        return self.order.shape[0]

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 where a row has one."""
        if self.scale is None or self.scale.ndim < 2:
            return 0
        return self.weight.shape[1] * 8 // self.bits // self.scale.shape[1]

    def fits(self, dtype: torch.dtype) -> bool:
        """Whether the kernel multiplies it with tokens of a dtype."""
        if not self.weight.is_contiguous():  # the kernel counts rows from the first number on
            return False
        if self.bits == NATIVE:
            return self.weight.dtype == dtype
        return self.bits in CODED and self.weight.shape[1] % 4 == 0  # read in words of 32 bits


def product_of(part: Any, mode: int = PLAIN, **more: Any) -> Product | None:
    """The product of a part of a layer, None for a module that is neither plain nor integers."""
    facts = {"order": None, "bias": None, "rank": 0} | more
    if isinstance(part, QuantizedLinear) and part.format.integer:
        bits, zero = getattr(part.format, "bits", 0), part.stored.get("zero")
        facts |= {"weight": part.codes, "scale": part.scale, "zero": zero, "bits": bits}
    elif type(part) in (nn.Linear, FusedSlice):
        facts |= {"weight": part.weight, "scale": None, "zero": None, "bits": NATIVE}
    else:
        return None
    return Product(mode=mode, columns=part.in_features, **facts)


def steps(layer: Any) -> list[Product | None]:
    """The one or two products, in turn, that a compressed layer is."""
    if isinstance(layer, QuantizedDense):
        return [product_of(layer.inner, bias=layer.bias)]
    if isinstance(layer, LowRankLinear):
        return [product_of(layer.down), product_of(layer.up, bias=layer.bias)]
    if not isinstance(layer, PackedLinear):
        return [None]
    rank, order = layer.rank, layer.order
    if layer.side == "out":
        last = product_of(layer.coefficients, OUTSIDE, order=order, rank=rank, bias=layer.bias)
        return [product_of(layer.basis), last]
    first = product_of(layer.coefficients, INSIDE, order=order, rank=rank)
    return [first, product_of(layer.basis, bias=layer.bias)]
