"""A stretch of columns, rounded one after the other with feedback (`rounding`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.devices import runs_triton

COLUMNS = 64
"""Columns whose corrections are added one at a time; those of all others come in one product."""


def nearest(numbers: Tensor, float8: bool) -> Tensor:
    """The integers nearest to numbers, or those of float8 (e4m3), which must be within its range.

    Halves go to the even one.
    """
    return numbers.to(torch.float8_e4m3fn).to(numbers.dtype) if float8 else numbers.round()


@dataclass(frozen=True, eq=False)
class Turn:
    """Columns that are rounded one after the other, each as a row of (columns, rows) tensors, fp32.

    Attributes:
        aims: what the columns after these leave to be aimed at.
        N: the columns' own square of the metric's factor.
        W: the matrix.
        divisor: steps, infinite where a step is 0.
        step: between two values of the grid.
        offset: of the grid, or None.
        low: smallest code of every row, (rows,).
        high: largest code, likewise.
        E: takes the errors.
        codes: takes the codes.
        float8: whether codes are numbers of float8 (e4m3) instead of integers.
    """

    aims: Tensor
    N: Tensor
    W: Tensor
    divisor: Tensor
    step: Tensor
    offset: Tensor | None
    low: Tensor
    high: Tensor
    E: Tensor
    codes: Tensor
    float8: bool = False

    def round_columns(self) -> None:
        """The last column first; all of them in one launch where that can be had."""
        if runs_triton(self.W.device):
            from spectrim.linalg.triton_rounding import round_columns

            of_grid = (self.divisor, self.step, self.offset, self.low, self.high)
            out = (self.E, self.codes)
            round_columns(self.aims, self.N, self.W, *of_grid, *out, COLUMNS, float8=self.float8)
            return
        for j in range(len(self.W) - 1, -1, -1):
            aim = self.aims[j] - self.N[j + 1 :, j] @ self.E[j + 1 :]
            if self.offset is not None:
                aim -= self.offset[j]
            aim = torch.clamp(aim / self.divisor[j], self.low, self.high)
            self.codes[j] = nearest(aim, self.float8)
            self.E[j] = self.codes[j] * self.step[j] - self.W[j]
            if self.offset is not None:
                self.E[j] += self.offset[j]
