"""Sums of `x xᵀ` as panels of their upper triangle: two thirds of the products and of the memory.

The lower triangle of a symmetric sum is its upper one, so only the panels at and above the
diagonal are multiplied and kept; `whole` gives the matrix itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spectrim.devices import HOST

ROWS_PER_PRODUCT = 4096
"""Tokens per fp32 product; longer sums of products are taken in the sum's own dtype."""

_PANEL = 384
"""Rows of a panel: narrower ones save products, wider ones multiply faster."""


def panel_numbers(size: int) -> int:
    """How many numbers a sum of this size keeps."""
    return sum(min(_PANEL, size - start) * (size - start) for start in range(0, size, _PANEL))


class SymmetricSum:
    """`Σ x xᵀ` over rows, (n, n).

    Args:
        size: n.
        dtype: of the sum; products are taken in the dtype of the rows.
        device: where it is.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str = HOST):
        self.size = size
        self.panels = [
            torch.zeros(stop - start, size - start, dtype=dtype, device=device)
            for start, stop in self._spans()
        ]

    @classmethod
    def of(cls, matrix: Tensor, dtype: torch.dtype) -> SymmetricSum:
        """A symmetric matrix as such a sum, rounded to `dtype`."""
        held = cls(0, dtype)
        held.size = matrix.shape[0]
        held.panels = [matrix[a:b, a:].to(dtype, copy=True) for a, b in held._spans()]
        return held

    @classmethod
    def from_panels(cls, panels: list[Tensor]) -> SymmetricSum:
        """A sum with the panels of another one, in the same memory."""
        held = cls(0, panels[0].dtype)
        held.size, held.panels = panels[0].shape[1], panels
        return held

    def _spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.size, _PANEL):
            yield start, min(start + _PANEL, self.size)

    def add(self, rows: Tensor) -> None:
        """Add the rows (tokens, n), in fp32 or fp64."""
        for part in rows.split(ROWS_PER_PRODUCT):
            for (start, stop), panel in zip(self._spans(), self.panels, strict=True):
                panel += part[:, start:stop].mT @ part[:, start:]

    def whole(self) -> Tensor:
        """The sum as a matrix, (n, n) fp64, exactly symmetric."""
        device = self.panels[0].device if self.panels else HOST
        matrix = torch.empty(self.size, self.size, dtype=torch.float64, device=device)
        for (start, stop), panel in zip(self._spans(), self.panels, strict=True):
            matrix[start:stop, start:] = panel
            matrix[stop:, start:stop] = panel[:, stop - start :].mT
            # Within the panel's square both triangles were multiplied; one of them counts.
            square = matrix[start:stop, start:stop]
            square.copy_(square.triu() + square.triu(1).mT)
        return matrix
