"""Sums of `x xᵀ` as panels of their upper triangle: two thirds of the products and of the memory.

The lower triangle of a symmetric sum is its upper one, so only the panels at and above the
diagonal are multiplied and kept; `whole` gives the matrix itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spectrim.devices import HOST, in_tf32

ROWS_PER_PRODUCT = 4096
"""Tokens per fp32 product; longer sums of products are taken in the sum's own dtype."""

_PANEL = 384
"""Rows of a panel: narrower ones save products, wider ones multiply faster."""


def reduction_dtype(x: Tensor) -> torch.dtype:
    """fp64 inputs stay fp64; everything else is multiplied in fp32 and summed in fp64.

    An fp32 product over a few thousand tokens is as exact as the fp32 forward pass that gave the
    tokens (a test shows the same decompositions as from fp64 products), at twice the speed.
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def parts_of(rows: Tensor) -> Iterator[Tensor]:
    """The rows of one product after the other, in the dtype in which they are multiplied."""
    for part in rows.split(ROWS_PER_PRODUCT):
        yield part.to(reduction_dtype(rows))


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

    def add(self, rows: Tensor, *, sampled: bool = False) -> None:
        """Add the rows (tokens, n).

        Halves are exact in TF32, so that accelerators multiply them in it.

        Args:
            rows: in the dtype in which they were computed.
            sampled: the sum is an estimate from sampled rows, which is off by a share of about one
                over the root of their number whatever they are rounded to: TF32 will do for fp32.
        """
        for part in parts_of(rows):
            with in_tf32(rows.device, sampled or rows.dtype.itemsize == 2):
                for (start, stop), panel in zip(self._spans(), self.panels, strict=True):
                    left, right = part[:, start:stop].mT, part[:, start:]
                    if panel.dtype == part.dtype:
                        panel.addmm_(left, right)
                    else:
                        panel += left @ right

    def whole(self) -> Tensor:
        """The sum as a matrix, (n, n) fp64, exactly symmetric."""
        device = self.panels[0].device if self.panels else HOST
        matrix = torch.empty(self.size, self.size, dtype=torch.float64, device=device)
        for (start, stop), panel in zip(self._spans(), self.panels, strict=True):
            matrix[start:stop, start:] = panel
        # Within the square of a panel both triangles were multiplied; one of them counts.
        matrix.triu_()
        matrix += matrix.triu(1).mT
        return matrix
