"""`W[i, j] = scale[i, g] (q[i, j] - 8) + zero[i, g]`: q in 0..15, g the group of 32 of column j.

Scale and zero point are bf16; zero is the value of the middle code, so that it stays small and
loses little by that. 5 bits per number with everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectrim.formats.kernels import Int4Kernel
from spectrim.formats.number_format import Coded, Shape

if TYPE_CHECKING:
    from torch import Tensor

    from spectrim.linalg.rounding import Grid

GROUP = 32
TOP, MIDDLE = 15, 8


class Affine4(Coded):
    """4-bit codes with a scale and a zero point per group."""

    name, bits = "int4", 4
    reference = True
    # Relative squared error of Gaussian rows.
    rounding_share = 6e-3
    kernel = Int4Kernel(GROUP, zeros=True)

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[Shape, str]]:
        """Two codes per byte, a row padded to whole groups."""
        groups = -(-columns // GROUP)
        return {
            "codes": ((rows, groups * GROUP // 2), "uint8"),
            "scale": ((rows, groups), "bf16"),
            "zero": ((rows, groups), "bf16"),
        }

    def scales(self, W: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """The range of every group from its smallest to its largest entry."""
        import torch

        rows, columns = W.shape
        groups = -(-columns // GROUP)
        # The last column fills the last group: padding must not widen its range.
        padding = W[:, -1:].expand(rows, groups * GROUP - columns)
        parts = torch.cat([W, padding], dim=1).view(rows, groups, GROUP)
        low, high = parts.amin(dim=2), parts.amax(dim=2)
        scale = ((high - low) / TOP).to(torch.bfloat16)
        zero = (low + MIDDLE * scale.to(torch.float64)).to(torch.bfloat16)
        return {"scale": scale, "zero": zero}

    def grid(self, scales: Mapping[str, Tensor], columns: int) -> Grid:
        """Sixteen values around a group's zero point."""
        from spectrim.linalg.rounding import Grid, by_column

        step, zero = (by_column(scales[name], GROUP, columns) for name in ("scale", "zero"))
        return Grid(step, zero, -MIDDLE, TOP - MIDDLE)

    def pack(self, codes: Tensor) -> Tensor:
        """Two codes per byte, the even column in its low half."""
        from torch.nn.functional import pad

        from spectrim.formats.packing import packed_codes

        return packed_codes(pad(codes + MIDDLE, (0, -codes.shape[1] % GROUP), value=MIDDLE), 4)

    def unpack(self, stored: Tensor, columns: int) -> Tensor:
        """Codes of the grid, from -8 to 7."""
        import torch

        from spectrim.formats.packing import unpacked_codes

        return unpacked_codes(stored, 4)[:, :columns].to(torch.int8) - MIDDLE
