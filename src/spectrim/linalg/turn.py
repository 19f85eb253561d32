"""A stretch of columns, rounded one after the other with feedback (`rounding`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spectrim.devices import runs_triton

COLUMNS = 64
"""Columns whose corrections are added one at a time; those of all others come in one product."""


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

    def round_columns(self) -> None:
        """The last column first; all of them in one launch where that can be had."""
        if runs_triton(self.W.device):
            from spectrim.linalg.triton_rounding import round_columns

            of_grid = (self.divisor, self.step, self.offset, self.low, self.high)
            round_columns(self.aims, self.N, self.W, *of_grid, self.E, self.codes, COLUMNS)
            return
        for j in range(len(self.W) - 1, -1, -1):
            aim = self.aims[j] - self.N[j + 1 :, j] @ self.E[j + 1 :]
            if self.offset is not None:
                aim -= self.offset[j]
            aim = (aim / self.divisor[j]).round_()
            torch.clamp(aim, self.low, self.high, out=self.codes[j])
            self.E[j] = self.codes[j] * self.step[j] - self.W[j]
            if self.offset is not None:
                self.E[j] += self.offset[j]
