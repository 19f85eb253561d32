"""Integer weights restored to plain numbers in one launch: a kernel in Triton.

With many tokens a product is arithmetic, for which a card has its own units and libraries; what is
missing is the matrix. Ordinary operators write it three or four times on the way.

Import this only where Triton is. `TRITON_INTERPRET=1`, set before, runs it on CPU tensors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectrim.serve.product import Product

RESTORED = 1024
"""Numbers that one program restores."""


@triton.jit
def _restore(
    codes_ptr, scale_ptr, zero_ptr, y_ptr, columns, size, groups,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    SPAN: tl.constexpr = GROUP if GROUP > 0 else COLUMNS
    row = tl.program_id(1).to(tl.int64)
    g = tl.program_id(0) * (COLUMNS // SPAN) + tl.arange(0, COLUMNS // SPAN)
    c = g[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
    inner = c < columns
    bit = c * BITS
    code = tl.load(codes_ptr + row * size + bit // 8, mask=inner, other=0).to(tl.int32) & 255
    if 8 % BITS != 0:  # a code may cross a byte
        last = tl.load(codes_ptr + row * size + (bit + BITS - 1) // 8, mask=inner, other=0)
        code = tl.where(bit % 8 + BITS > 8, code | (last.to(tl.int32) & 255) << 8, code)
    code = (code >> (bit % 8)) & (2**BITS - 1)
    if BITS == 8:
        code ^= 128
    value = (code - 2 ** (BITS - 1)).to(tl.float32)
    if GROUP == 0:
        value *= tl.load(scale_ptr + row).to(tl.float32)
    else:
        group = row * groups + g
        scale = tl.load(scale_ptr + group, mask=g < groups, other=0.0)
        value *= scale.to(tl.float32)[:, None]
        if ZERO:
            zero = tl.load(zero_ptr + group, mask=g < groups, other=0.0)
            value += zero.to(tl.float32)[:, None]
    tl.store(y_ptr + row * columns + c, value.to(y_ptr.dtype.element_ty), mask=inner)


def restored(p: Product, dtype: torch.dtype) -> Tensor:
    """The matrix (rows, columns) that codes of any number of bits stand for, in one launch."""
    y = torch.empty(p.weight.shape[0], p.columns, dtype=dtype, device=p.weight.device)
    assert p.scale is not None
    groups = p.scale.shape[1] if p.scale.ndim == 2 else 0
    _restore[(triton.cdiv(p.columns, RESTORED), p.weight.shape[0])](  # type: ignore[index]
        p.weight, p.scale, p.scale if p.zero is None else p.zero, y,
        p.columns, p.weight.shape[1], groups,
        BITS=p.bits, GROUP=p.group, ZERO=p.zero is not None, COLUMNS=RESTORED,
    )  # fmt: skip
    return y


@torch.library.custom_op("spectrim::matrix", mutates_args=())
def matrix(
    codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """`restored` for graphs."""
    return restored(Product(codes, scale, zero, None, None, 0, 0, bits, columns), dtype)


@matrix.register_fake
def _shape(codes, scale, zero, bits, columns, dtype):
    return scale.new_empty(codes.shape[0], columns, dtype=dtype)
