"""torch's product with 4-bit codes on a CPU.

The kernel takes codes 0..15 with a bf16 scale and zero point per group, `scale (q - 8) + zero`,
once the codes lie in its own order. torchao's int4 layers for CPUs call the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectrim.formats.number_format import Kernel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Int4Kernel"]

OUT_MULTIPLE = 16
"""The kernel's rows come in blocks of this many."""


class Int4Kernel(Kernel):
    """`torch._weight_int4pack_mm_for_cpu`.

    Args:
        group: columns that share a scale: 32, 64, 128 or 256.
        zeros: whether the stored tensors have zero points.
    """

    name = "torch's int4 kernel"

    def __init__(self, group: int, *, zeros: bool):
        self.group = group
        self.zeros = zeros

    def obstacle(self, tensors: Mapping[str, Tensor], columns: int, dtype: torch.dtype) -> str:
        """Other devices and dtypes, and rows that are no multiple of 16."""
        import torch

        codes = tensors["codes"]
        if not hasattr(torch, "_weight_int4pack_mm_for_cpu"):
            return "this torch has no int4 kernel for CPUs"
        if codes.device.type != "cpu":
            return f"the kernel is for CPUs, the codes lie on {codes.device}"
        if dtype != torch.bfloat16:
            # In fp32 the kernel is tens of times slower than restoring the matrix.
            return f"the kernel is slow in {dtype}"
        if codes.shape[0] % OUT_MULTIPLE:
            return f"{codes.shape[0]} rows are no multiple of {OUT_MULTIPLE}"
        return "" if codes.numel() else "nothing to multiply"

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Codes in the kernel's order, and pairs of scale and zero by group and row."""
        import torch

        from spectrim.formats.packing import unpacked_codes

        codes = unpacked_codes(tensors["codes"], 4).to(torch.int32)
        scale = tensors["scale"]
        zero = tensors["zero"] if self.zeros else torch.zeros_like(scale)
        pairs = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
        packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        return {"packed": packed, "pairs": pairs}

    def unpack(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Codes, scales and zero points as they are stored."""
        import torch

        from spectrim.formats.packing import packed_codes

        # The kernel's order differs between processors, so it is undone by the kernel itself: with
        # scales of one and zero points of zero the unit vectors give q - 8, which bf16 holds.
        pairs = packed["pairs"]
        unit = torch.eye(pairs.shape[0] * self.group, dtype=torch.bfloat16)
        plain = torch.zeros_like(pairs)
        plain[..., 0] = 1
        values = torch._weight_int4pack_mm_for_cpu(unit, packed["packed"], self.group, plain).mT
        scale, zero = (x.contiguous() for x in pairs.transpose(0, 1).unbind(dim=-1))
        found = {"codes": packed_codes(values.to(torch.int32) + 8, 4), "scale": scale}
        return found | ({"zero": zero} if self.zeros else {})

    def multiply(self, x: Tensor, packed: Mapping[str, Tensor]) -> Tensor:
        """(tokens, columns) -> (tokens, rows)."""
        import torch

        pairs = packed["pairs"]
        x = torch.nn.functional.pad(x, (0, pairs.shape[0] * self.group - x.shape[1]))
        return torch._weight_int4pack_mm_for_cpu(x, packed["packed"], self.group, pairs)
