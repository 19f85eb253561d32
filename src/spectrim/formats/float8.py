"""`W[i, j] = scale[i] q[i, j]`: q a number of float8 (e4m3), one bf16 scale per row.

Codes have three bits behind the point and reach to 448: what is rounded away is a share of every
number, not of the largest one of its row, so rows with outliers lose less than in `int8` and all
others more. The scale is bf16 because checkpoints in that dtype hold it so wherever they go, and
codes are found after it was rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectrim.formats.number_format import Coded, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from spectrim.linalg.rounding import Grid

TOP = 448
"""The largest number of float8 (e4m3)."""

_HALF = 0b0011_1111_1000_0000 - 2**15
"""Bits of a half that come from a code: its sign, four bits of exponent, three behind the point."""


class Float8(Coded):
    """8-bit floating-point codes with a scale per row."""

    name, bits = "fp8", 8
    integer = False
    # Relative squared error of Gaussian rows.
    rounding_share = 7e-4

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[Shape, str]]:
        """Codes and scales."""
        return {"codes": ((rows, columns), "fp8"), "scale": ((rows,), "bf16")}

    def scales(self, W: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """The largest entry of every row gets the largest code."""
        import torch

        largest = W.abs().amax(dim=1) if W.shape[1] else W.new_zeros(W.shape[0])
        return {"scale": (largest / TOP).to(torch.bfloat16)}

    def grid(self, scales: Mapping[str, Tensor], columns: int) -> Grid:
        """The numbers of float8, times a row's scale."""
        from spectrim.linalg.rounding import Grid

        step = scales["scale"][:, None].expand(-1, columns)
        return Grid(step, None, -TOP, TOP, float8=True)

    def pack(self, codes: Tensor) -> Tensor:
        """One code per byte."""
        import torch

        return codes.to(torch.float8_e4m3fn)

    def unpack(self, stored: Tensor, columns: int) -> Tensor:
        """The codes as numbers, fp32."""
        import torch

        # CPUs cast float8 one number after the other. Moved to where a half has them, the same bits
        # are the number divided by 2^8: the exponent counts from 15 there and from 7 here.
        bits = stored.view(torch.int8).to(torch.int16)
        return (bits << 7 & _HALF).view(torch.float16).float().mul_(2**8)
