"""torch's products with 4-bit codes, on a CPU and on CUDA cards.

Both take codes 0..15 with a bf16 scale and zero point per group, `scale (q - 8) + zero`, once the
codes lie in an order of their own, which differs between processors. Whether a kernel can be used
is found out by using it: codes go in and have to come out again. torchao's int4 layers call the
same kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from spectrim.formats.number_format import Kernel

if TYPE_CHECKING:
    import torch
    from torch import Tensor

OUT_MULTIPLE = 16
"""The kernels' rows come in blocks of this many, or of half as many."""

TILES = 2
"""Tiles of 16 columns that a card keeps together; the smallest number fits every group."""


class Int4Kernel(Kernel):
    """`torch._weight_int4pack_mm`, or its sibling for CPUs.

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
        if dtype != torch.bfloat16:
            # In fp32 the CPU's kernel is tens of times slower than restoring the matrix.
            return f"the kernel is slow in {dtype} or does not take it"
        if codes.shape[0] % OUT_MULTIPLE:
            return f"{codes.shape[0]} rows are no multiple of {OUT_MULTIPLE}"
        return _obstacle_on(codes.device, self.group) if codes.numel() else "nothing to multiply"

    def at_hand(self, device: torch.device, dtype: torch.dtype) -> bool:
        """In bf16, where the kernel is there and gives codes back."""
        import torch

        return dtype == torch.bfloat16 and not _obstacle_on(device, self.group)

    def pack(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Codes in the kernel's order, and pairs of scale and zero by group and row."""
        import torch

        from spectrim.formats.packing import unpacked_codes

        scale = tensors["scale"]
        zero = tensors["zero"] if self.zeros else torch.zeros_like(scale)
        pairs = torch.stack([scale, zero], dim=-1).transpose(0, 1).contiguous()
        return {"packed": _ordered(unpacked_codes(tensors["codes"], 4)), "pairs": pairs}

    def unpack(self, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Codes, scales and zero points as they are stored."""
        from spectrim.formats.packing import packed_codes

        pairs = packed["pairs"]
        codes = packed_codes(_in_rows(packed["packed"], self.group, pairs), 4)
        scale, zero = (x.contiguous() for x in pairs.transpose(0, 1).unbind(dim=-1))
        found = {"codes": codes, "scale": scale}
        return found | ({"zero": zero} if self.zeros else {})

    def multiply(self, x: Tensor, packed: Mapping[str, Tensor]) -> Tensor:
        """(tokens, columns) -> (tokens, rows)."""
        import torch

        pairs = packed["pairs"]
        x = torch.nn.functional.pad(x, (0, pairs.shape[0] * self.group - x.shape[1]))
        return _product(x, packed["packed"], self.group, pairs)


def _ordered(codes: Tensor) -> Tensor:
    """Codes 0..15 (rows, columns) in the order of their device's kernel."""
    import torch

    from spectrim.devices import on_host

    if on_host(codes.device):
        return torch._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    halves = codes[:, ::2] << 4 | codes[:, 1::2]
    return torch._convert_weight_to_int4pack(halves.to(torch.uint8).contiguous(), TILES)


def _product(x: Tensor, packed: Tensor, group: int, pairs: Tensor) -> Tensor:
    import torch

    from spectrim.devices import on_host

    if on_host(x.device):
        return torch._weight_int4pack_mm_for_cpu(x, packed, group, pairs)
    return torch._weight_int4pack_mm(x.contiguous(), packed, group, pairs)


def _in_rows(packed: Tensor, group: int, pairs: Tensor) -> Tensor:
    """Codes (rows, columns), int32, from their kernel's order.

    It is undone by the kernel itself: with scales of one and zero points of zero the unit vectors
    give q - 8, which bf16 holds.
    """
    import torch

    unit = torch.eye(pairs.shape[0] * group, dtype=torch.bfloat16, device=packed.device)
    plain = torch.zeros_like(pairs)
    plain[..., 0] = 1
    return _product(unit, packed, group, plain).mT.to(torch.int32) + 8


@cache
def _obstacle_on(device: torch.device, group: int) -> str:
    """Why a device's kernel cannot be used, empty if every code comes back from its order."""
    import torch

    from spectrim.devices import has_kernel, on_host

    needed = "_weight_int4pack_mm_for_cpu" if on_host(device) else "_weight_int4pack_mm"
    if not has_kernel(needed, device):
        return f"this torch has no int4 kernel for {device.type}"
    numbers = torch.arange(OUT_MULTIPLE * group, device=device, dtype=torch.int32)
    codes = (numbers % 16 + numbers // group) % 16
    codes = codes.view(OUT_MULTIPLE, group)
    pairs = torch.ones(1, OUT_MULTIPLE, 2, device=device, dtype=torch.bfloat16)
    try:
        found = _in_rows(_ordered(codes), group, pairs)
    except RuntimeError as error:  # an older card says so when it is asked
        return f"{device} refuses the kernel ({(str(error).splitlines() or ['no reason'])[0]})"
    return "" if torch.equal(found, codes) else f"the kernel of {device} mixes up codes"
