"""One product with the tokens of one step, in one launch: a kernel in Triton.

    plain    y = W x
    inside   y = x_p + W x_n,  [x_p; x_n] = x[order]      (packed on the in-side, its first half)
    outside  y = [x; W x][order]                          (packed on the out-side, its second half)

With a few tokens a product reads every weight once and does little else, and what it costs beside
is launches. A packed layer made of ordinary operators has four or five; read through its order it
has two, as many as plain factors, and moves no intermediate value twice. Every program owns a few
rows and reads them from end to end, so that there are programs enough for a whole card even where
there is one token, and no sum is split.

Import this only where Triton is. `TRITON_INTERPRET=1`, set before, runs it on CPU tensors: that is
how it is tested without a card.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PLAIN, INSIDE, OUTSIDE = 0, 1, 2

ROWS, COLUMNS = 4, 512
"""Of the matrix, that a program holds at a time: a row's stretch fills several memory accesses."""


@triton.jit
def _rows(
    x_ptr, weight_ptr, order_ptr, bias_ptr, y_ptr, out, columns, rank, x_stride,
    MODE: tl.constexpr, BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = r < out
    x_ptr += token * x_stride
    row = r
    if MODE == 2:
        row = tl.load(order_ptr + r, mask=exists, other=0) - rank  # negative: a pivot
    multiplies = exists & (row >= 0)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        inner = c < columns
        place = c
        if MODE == 1:
            place = tl.load(order_ptr + rank + c, mask=inner, other=0)
        x = tl.load(x_ptr + place, mask=inner, other=0.0).to(tl.float32)
        where = row.to(tl.int64)[:, None] * columns + c[None, :]
        weight = tl.load(weight_ptr + where, mask=multiplies[:, None] & inner[None, :], other=0.0)
        total += weight.to(tl.float32) * x[None, :]
    y = tl.sum(total, axis=1)
    if MODE == 1:
        place = tl.load(order_ptr + r, mask=exists, other=0)
        y += tl.load(x_ptr + place, mask=exists, other=0.0).to(tl.float32)
    if MODE == 2:
        pivot = exists & (row < 0)
        y += tl.load(x_ptr + row + rank, mask=pivot, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + r, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * out + r, y.to(y_ptr.dtype.element_ty), mask=exists)


@torch.library.custom_op("spectrim::rows", mutates_args=())
def rows(
    x: Tensor, weight: Tensor, order: Tensor | None, bias: Tensor | None, rank: int, mode: int
) -> Tensor:
    """A product of a few tokens, summed in fp32; no gradient.

    Args:
        x: (tokens, in), in the weight's dtype.
        weight: (rows, columns).
        order: int32, of a packed layer; None for a plain product.
        bias: (out,) or None.
        rank: pivots of a packed layer; 0 for a plain product.
        mode: `PLAIN`, `INSIDE` or `OUTSIDE`.

    Returns:
        (tokens, out): as many as rows, with `OUTSIDE` as many as the order has places.
    """
    x, weight = x.contiguous(), weight.contiguous()
    out = _out(weight, order, mode)
    y = x.new_empty(x.shape[0], out)
    grid = (triton.cdiv(out, ROWS), x.shape[0])
    _rows[grid](  # type: ignore[index]
        x, weight, order if order is not None else x, bias if bias is not None else x, y,
        out, weight.shape[1], rank, x.shape[1],
        MODE=mode, BIAS=bias is not None, ROWS=ROWS, COLUMNS=COLUMNS,
    )  # fmt: skip
    return y


@rows.register_fake
def _shape(
    x: Tensor, weight: Tensor, order: Tensor | None, bias: Tensor | None, rank: int, mode: int
) -> Tensor:
    return x.new_empty(x.shape[0], _out(weight, order, mode))


def _out(weight: Tensor, order: Tensor | None, mode: int) -> int:
    if mode != OUTSIDE:
        return weight.shape[0]
    assert order is not None
    return order.shape[0]
