"""Products with the tokens of one step, up to three of them in one launch: a kernel in Triton.

    plain    y = W x
    inside   y = x_p + W x_n,  [x_p; x_n] = x[order]      (packed on the in-side, its first half)
    outside  y = [x; W x][order]                          (packed on the out-side, its second half)

With a few tokens a product reads every weight once and does little else, and what it costs beside
is launches. A packed layer made of ordinary operators has four or five; read through its order it
has two, as many as plain factors, and moves no intermediate value twice. Layers that read the same
input (q, k, v; gate, up) share their launches. Every program owns a few rows and reads them from
end to end, so that there are programs enough for a whole card even where there is one token, and no
sum is split.

Codes of 4 and 8 bits are read as they are stored, a 32-bit word at a time. Moved to the top of the
mantissa of a number between 1 and 2, a code q of b bits is 1 + q / 2^b without a conversion, of
which a card does half as many per second as products.

Import this only where Triton is. `TRITON_INTERPRET=1`, set before, runs it on CPU tensors: that is
how it is tested without a card.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spectrim.serve.product import MOST, NATIVE, OUTSIDE, Product

WARP = 32
BYTES = 16
"""That a thread reads of a row at a time."""

ROWS = {1: 2, 4: 4, 16: 8}
"""Rows of a program, by the rows of a launch in units of 1024: few rows need many programs."""

WASTE = 1.15
"""Share of reads beyond the end of a row up to which more warps are the better choice."""


@triton.jit
def _plain_sum(
    x_ptr, weight_ptr, order_ptr, row, exists, columns, rank,
    INSIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Products of some rows with one token, (ROWS,) fp32."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, columns, COLUMNS):
        c = start + tl.arange(0, COLUMNS)
        inner = c < columns
        place = c
        if INSIDE:
            place = tl.load(order_ptr + rank + c, mask=inner, other=0)
        x = tl.load(x_ptr + place, mask=inner, other=0.0).to(tl.float32)
        where = row.to(tl.int64)[:, None] * columns + c[None, :]
        weight = tl.load(weight_ptr + where, mask=exists[:, None] & inner[None, :], other=0.0)
        total += weight.to(tl.float32) * x[None, :]
    return tl.sum(total, axis=1)


@triton.jit
def _plus_times(part, word, x, BITS: tl.constexpr, slot: tl.constexpr):
    """`part + (1 + q / 2^BITS) x` for the code q at a place of every word, fp32."""
    shift: tl.constexpr = 23 - BITS - BITS * slot
    code = word << shift if shift > 0 else word >> -shift
    value = (code & ((2**BITS - 1) << (23 - BITS))) | 0x3F800000
    return part + value.to(tl.float32, bitcast=True) * x[None, :]


@triton.jit
def _plus_four(part, word, x, BITS: tl.constexpr, first: tl.constexpr, step: tl.constexpr):
    """`part` and four codes more; and the sum of their x, which is (words, 2, 2)."""
    even, odd = tl.split(x)
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    part = _plus_times(part, word, x0, BITS, first)
    part = _plus_times(part, word, x1, BITS, first + step)
    part = _plus_times(part, word, x2, BITS, first + 2 * step)
    part = _plus_times(part, word, x3, BITS, first + 3 * step)
    return part, x0 + x1 + x2 + x3


@triton.jit
def _coded_sum(
    x_ptr, codes_ptr, scale_ptr, zero_ptr, order_ptr, row, exists, columns, rank, words,
    INSIDE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The same with codes: `scale (q - 2^(BITS - 1)) + zero`, scales per group or, 0, per row."""
    PER: tl.constexpr = 32 // BITS
    WORDS: tl.constexpr = COLUMNS // PER
    SPAN: tl.constexpr = GROUP // PER if GROUP > 0 else WORDS
    total = tl.zeros((ROWS, WORDS // SPAN), tl.float32)
    for start in range(0, words, WORDS):
        c = start * PER + tl.arange(0, COLUMNS)
        place = c
        if INSIDE:
            place = tl.load(order_ptr + rank + c, mask=c < columns, other=0)
        x = tl.load(x_ptr + place, mask=c < columns, other=0.0).to(tl.float32)
        w = start + tl.arange(0, WORDS)
        where = row.to(tl.int64)[:, None] * words + w[None, :]
        word = tl.load(codes_ptr + where, mask=exists[:, None] & (w < words)[None, :], other=0)
        part = tl.zeros((ROWS, WORDS), tl.float32)
        if BITS == 8:
            word ^= -2139062144  # 0x80 in every byte: signed codes, counted from -128
            part, sums = _plus_four(part, word, tl.reshape(x, (WORDS, 2, 2)), BITS, 0, 1)
        else:
            even, odd = tl.split(tl.reshape(x, (WORDS, 2, 2, 2)))
            part, even_sums = _plus_four(part, word, even, BITS, 0, 2)
            part, odd_sums = _plus_four(part, word, odd, BITS, 1, 2)
            sums = even_sums + odd_sums
        sums = tl.sum(tl.reshape(sums, (WORDS // SPAN, SPAN)), axis=1)[None, :]
        part = tl.sum(tl.reshape(part, (ROWS, WORDS // SPAN, SPAN)), axis=2) - 1.5 * sums
        if GROUP > 0:
            g = start // SPAN + tl.arange(0, WORDS // SPAN)
            group = row.to(tl.int64)[:, None] * (words // SPAN) + g[None, :]
            both = exists[:, None] & (g < words // SPAN)[None, :]
            part *= tl.load(scale_ptr + group, mask=both, other=0.0).to(tl.float32)
            if ZERO:
                zero = tl.load(zero_ptr + group, mask=both, other=0.0).to(tl.float32)
                part += sums * (zero * 2.0**-BITS)
        total += part
    y = tl.sum(total, axis=1) * 2.0**BITS
    if GROUP == 0:
        y *= tl.load(scale_ptr + row, mask=exists, other=0.0).to(tl.float32)
    return y


@triton.jit
def _product(
    block, token, x_ptr, weight_ptr, scale_ptr, zero_ptr, order_ptr, bias_ptr, y_ptr,
    out, columns, rank, words,
    MODE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some rows of one product, from a token to what is stored."""
    INSIDE: tl.constexpr = MODE == 1
    r = block * ROWS + tl.arange(0, ROWS)
    exists = r < out
    x_ptr += token * (columns + rank * INSIDE)
    row = r
    if MODE == 2:
        row = tl.load(order_ptr + r, mask=exists, other=0) - rank  # negative: a pivot
    some = exists & (row >= 0)
    if BITS == 16:
        y = _plain_sum(
            x_ptr, weight_ptr, order_ptr, row, some, columns, rank, INSIDE, ROWS, COLUMNS
        )
    else:
        y = _coded_sum(
            x_ptr, weight_ptr, scale_ptr, zero_ptr, order_ptr, row, some, columns, rank, words,
            INSIDE, BITS, GROUP, ZERO, ROWS, COLUMNS,
        )  # fmt: skip
    if INSIDE:
        place = tl.load(order_ptr + r, mask=exists, other=0)
        y += tl.load(x_ptr + place, mask=exists, other=0.0).to(tl.float32)
    if MODE == 2:
        pivot = exists & (row < 0)
        y += tl.load(x_ptr + row + rank, mask=pivot, other=0.0).to(tl.float32)
    if BIAS:
        y += tl.load(bias_ptr + r, mask=exists, other=0.0).to(tl.float32)
    tl.store(y_ptr + token * out + r, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _products(
    x0, weight0, scale0, zero0, order0, bias0, y0, out0, columns0, rank0, words0,
    x1, weight1, scale1, zero1, order1, bias1, y1, out1, columns1, rank1, words1,
    x2, weight2, scale2, zero2, order2, bias2, y2, out2, columns2, rank2, words2,
    MODE0: tl.constexpr, BITS0: tl.constexpr, GROUP0: tl.constexpr, ZERO0: tl.constexpr,
    BIAS0: tl.constexpr,
    MODE1: tl.constexpr, BITS1: tl.constexpr, GROUP1: tl.constexpr, ZERO1: tl.constexpr,
    BIAS1: tl.constexpr,
    MODE2: tl.constexpr, BITS2: tl.constexpr, GROUP2: tl.constexpr, ZERO2: tl.constexpr,
    BIAS2: tl.constexpr,
    COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = tl.program_id(1)
    first = tl.cdiv(out0, ROWS)
    second = first
    if COUNT > 1:
        second += tl.cdiv(out1, ROWS)
    if block < first:
        _product(
            block, token, x0, weight0, scale0, zero0, order0, bias0, y0,
            out0, columns0, rank0, words0, MODE0, BITS0, GROUP0, ZERO0, BIAS0, ROWS, COLUMNS,
        )  # fmt: skip
    if COUNT > 1:  # noqa: SIM102 - known when it is compiled
        if (block >= first) & (block < second):
            _product(
                block - first, token, x1, weight1, scale1, zero1, order1, bias1, y1,
                out1, columns1, rank1, words1, MODE1, BITS1, GROUP1, ZERO1, BIAS1, ROWS, COLUMNS,
            )  # fmt: skip
    if COUNT > 2:  # noqa: SIM102
        if block >= second:
            _product(
                block - second, token, x2, weight2, scale2, zero2, order2, bias2, y2,
                out2, columns2, rank2, words2, MODE2, BITS2, GROUP2, ZERO2, BIAS2, ROWS, COLUMNS,
            )  # fmt: skip


def _tiles(products: Sequence[Product]) -> dict[str, int]:
    """How much of a matrix a program holds at a time, and its warps."""
    total = sum(p.out for p in products)
    rows = max(rows for least, rows in ROWS.items() if least == 1 or total >= 1024 * least)
    span = WARP * max(BYTES * 8 // p.bits for p in products)
    columns = max(p.columns for p in products)
    read = {warps: triton.cdiv(columns, span * warps) * span * warps for warps in (4, 2, 1)}
    warps = next((w for w, size in read.items() if size <= WASTE * columns), 1)
    return {"ROWS": rows, "COLUMNS": span * warps, "num_warps": warps}


def launch(xs: Sequence[Tensor], products: Sequence[Product], **tiles: int) -> list[Tensor]:
    """The products of a few tokens, summed in fp32; no gradient.

    Args:
        xs: for every product its (tokens, in), contiguous, in the model's dtype.
        products: at most `MOST`.
        tiles: `ROWS`, `COLUMNS` and `num_warps`, where not as `_tiles` chooses them.

    Returns:
        For every product (tokens, out) in the dtype of x.
    """
    ys = [x.new_empty(x.shape[0], p.out) for x, p in zip(xs, products, strict=True)]
    values: list[Any] = []
    facts: dict[str, Any] = {}
    for i in range(MOST):
        j = min(i, len(products) - 1)
        x, p, y = xs[j], products[j], ys[j]
        weight = p.weight if p.bits == NATIVE else p.weight.view(torch.int32)
        values += [x, weight, *(x if t is None else t for t in p[1:5]), y]
        values += [p.out, p.columns, p.rank, weight.shape[1]]
        facts |= {f"MODE{i}": p.mode, f"BITS{i}": p.bits, f"GROUP{i}": p.group}
        facts |= {f"ZERO{i}": p.zero is not None, f"BIAS{i}": p.bias is not None}
    facts |= {"COUNT": len(products), **_tiles(products), **tiles}
    blocks = sum(triton.cdiv(p.out, facts["ROWS"]) for p in products)
    _products[(blocks, xs[0].shape[0])](*values, **facts)  # type: ignore[index]
    return ys


@torch.library.custom_op("spectrim::products", mutates_args=())
def products(
    xs: list[Tensor],
    weights: list[Tensor],
    scales: list[Tensor | None],
    zeros: list[Tensor | None],
    orders: list[Tensor | None],
    biases: list[Tensor | None],
    ranks: list[int],
    modes: list[int],
    bits: list[int],
    columns: list[int],
) -> list[Tensor]:
    """`launch` for graphs, which know tensors and numbers only."""
    fields = (weights, scales, zeros, orders, biases, ranks, modes, bits, columns)
    return launch(xs, [Product(*field) for field in zip(*fields, strict=True)])


@products.register_fake
def _shapes(xs, weights, scales, zeros, orders, biases, ranks, modes, bits, columns):
    sources = zip(xs, weights, orders, modes, strict=True)
    outs = [(x, (order if mode == OUTSIDE else W).shape[0]) for x, W, order, mode in sources]
    return [x.new_empty(x.shape[0], out) for x, out in outs]
