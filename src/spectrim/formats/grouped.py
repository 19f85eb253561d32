"""`W[i, j] = scale[i, g] q[i, j]`: b-bit codes, one bf16 scale per group of columns, no zero point.

Codes run from -2^(b-1) to 2^(b-1) - 1. The long side is free to lie on either sign, since scales
may be negative, so that the largest entry of a group gets the largest code. Scales are not those of
the range: clipping the extremes makes the others finer, and the scale with the least squared error,
weighted by what errors cost in a column, is taken from a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectrim.formats.kernels import Int4Kernel
from spectrim.formats.number_format import Coded, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from spectrim.linalg.rounding import Grid

CLIPS = tuple(0.44 + 0.07 * i for i in range(9))
"""Shares of the range's scale that are tried; below four bits with either sign, since there the
range is noticeably longer on one side."""

SHARES = {2: 0.13, 3: 0.035, 4: 0.009, 8: 5e-5}
"""Relative squared error of Gaussian groups of 64, rounded to nearest, by bits."""


class Grouped(Coded):
    """Codes of b bits in groups.

    Args:
        bits: 2, 3, 4 or 8.
        group: columns that share a scale, a multiple of 8.
    """

    def __init__(self, bits: int, group: int):
        self.bits, self.group = bits, group
        self.name = f"int{bits}-g{group}"
        self.rounding_share = SHARES[bits]
        self.kernel = Int4Kernel(group, zeros=False) if bits == 4 else None
        self.low, self.high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[Shape, str]]:
        """Codes side by side in bytes, a row padded to whole groups, and a scale per group."""
        groups = -(-columns // self.group)
        size = groups * (self.group * self.bits // 8)
        number = "int8" if self.bits == 8 else "uint8"
        return {"codes": ((rows, size), number), "scale": ((rows, groups), "bf16")}

    def scales(self, W: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """The scale of every group with the least weighted squared error, of those tried."""
        import torch
        from torch.nn.functional import pad

        rows, columns = W.shape
        groups = -(-columns // self.group)
        if not rows * groups:
            return {"scale": W.new_zeros(rows, groups, dtype=torch.bfloat16)}
        missing = groups * self.group - columns
        # fp32 is enough to choose a scale that is stored in bf16.
        parts = pad(W, (0, missing)).view(rows, groups, self.group).float()
        cost = W.new_ones(columns) if importance is None else importance / importance.mean()
        cost = pad(cost, (0, missing)).view(groups, self.group).float()
        peak = parts.gather(2, parts.abs().argmax(dim=2, keepdim=True))[..., 0] / self.low
        best = torch.zeros_like(peak)
        least = torch.full_like(peak, torch.inf)
        for share in (*CLIPS, *(-clip for clip in CLIPS if self.bits < 4)):
            scale = (share * peak).to(torch.bfloat16).float()
            divisor = torch.where(scale != 0, scale, torch.ones_like(scale))[..., None]
            codes = (parts / divisor).round_().clamp_(self.low, self.high)
            error = codes.mul_(scale[..., None]).sub_(parts).square_().mul_(cost).sum(dim=2)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return {"scale": best.to(torch.bfloat16)}

    def grid(self, scales: Mapping[str, Tensor], columns: int) -> Grid:
        """Multiples of a group's scale."""
        from spectrim.linalg.rounding import Grid, by_column

        return Grid(by_column(scales["scale"], self.group, columns), None, self.low, self.high)

    def pack(self, codes: Tensor) -> Tensor:
        """Eight codes in as many bytes as a code has bits."""
        import torch
        from torch.nn.functional import pad

        from spectrim.formats.packing import packed_codes

        codes = pad(codes, (0, -codes.shape[1] % self.group))
        return codes.to(torch.int8) if self.bits == 8 else packed_codes(codes - self.low, self.bits)

    def unpack(self, stored: Tensor, columns: int) -> Tensor:
        """Codes of the grid."""
        import torch

        from spectrim.formats.packing import unpacked_codes

        if self.bits == 8:
            return stored[:, :columns]
        return unpacked_codes(stored, self.bits)[:, :columns].to(torch.int8) + self.low
