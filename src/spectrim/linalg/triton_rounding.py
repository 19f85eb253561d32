"""Rounding with feedback, a stretch of columns in one launch: a kernel in Triton.

A column waits for the one after it, so ordinary operators take six launches per column, which on a
card is all the time there is. Rows do not wait for each other: a thread owns a row and goes through
its columns with everything in registers.

Import this only where Triton is. `TRITON_INTERPRET=1`, set before, runs it on CPU tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

ROWS = 32
"""Of the matrix, per program: one warp."""

_HALVES = 12582912.0
"""1.5 * 2^23: fp32 numbers of this size are whole, so adding it rounds, halves to even."""


@triton.jit
def _round(
    aims_ptr, N_ptr, W_ptr, divisor_ptr, step_ptr, offset_ptr, low_ptr, high_ptr, E_ptr, codes_ptr,
    columns, rows,
    OFFSET: tl.constexpr, FLOAT8: tl.constexpr, HALVES: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = r < rows
    c = tl.arange(0, COLUMNS)
    both = (c < columns)[:, None] & exists[None, :]
    aims = tl.load(aims_ptr + c[:, None] * rows + r[None, :], mask=both, other=0.0)
    low = tl.load(low_ptr + r, mask=exists, other=0.0)
    high = tl.load(high_ptr + r, mask=exists, other=0.0)
    for i in range(0, columns):
        j = columns - 1 - i
        place = j * rows + r
        aim = tl.sum(tl.where((c == j)[:, None], aims, 0.0), axis=0)
        step = tl.load(step_ptr + place, mask=exists, other=0.0)
        error = -tl.load(W_ptr + place, mask=exists, other=0.0)
        if OFFSET:
            offset = tl.load(offset_ptr + place, mask=exists, other=0.0)
            aim -= offset
            error += offset
        code = aim / tl.load(divisor_ptr + place, mask=exists, other=1.0)
        code = tl.minimum(tl.maximum(code, low - 1), high + 1)
        halves = HALVES
        if FLOAT8:  # an eighth of the number's power of two, and of 2^-6 at least
            power = (code.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            halves = tl.maximum(power, 0.015625) * (HALVES / 8)
        code = tl.minimum(tl.maximum((code + halves) - halves, low), high)
        error += code * step
        tl.store(codes_ptr + place, code, mask=exists)
        tl.store(E_ptr + place, error, mask=exists)
        passed_on = tl.load(N_ptr + j * columns + c, mask=c < j, other=0.0)
        aims -= passed_on[:, None] * error[None, :]


def round_columns(
    aims: Tensor, N: Tensor, W: Tensor, divisor: Tensor, step: Tensor, offset: Tensor | None,
    low: Tensor, high: Tensor, E: Tensor, codes: Tensor, most: int, *, float8: bool = False,
) -> None:  # fmt: skip
    """`Turn.round_columns` on a card, for a turn's tensors and no more than `most` columns."""
    columns, rows = W.shape
    _round[(triton.cdiv(rows, ROWS),)](  # type: ignore[index]
        aims, N.contiguous(), W, divisor, step, W if offset is None else offset, low, high, E,
        codes, columns, rows,
        OFFSET=offset is not None, FLOAT8=float8, HALVES=_HALVES,
        COLUMNS=most, ROWS=ROWS, num_warps=1,
    )  # fmt: skip
