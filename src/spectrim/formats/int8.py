"""`W[i, j] = scale[i] q[i, j]`: q in -127..127, one fp32 scale per row.

The product multiplies the codes themselves and scales the result, which is exact up to the
arithmetic of the product; torch's int8 kernel does it without a copy of the matrix where it is fast
(bf16 on a CPU, sides that are multiples of 16).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from spectrim.formats.number_format import Coded, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from spectrim.linalg.rounding import Grid

TOP = 127

KERNEL_MULTIPLE = 16
"""Both sides of a matrix that torch's int8 kernel multiplies are multiples of this."""

KERNEL = "_weight_int8pack_mm"


class Int8(Coded):
    """8-bit codes with a scale per row."""

    name, bits = "int8", 8
    reference = True
    # Relative squared error of Gaussian rows.
    rounding_share = 1e-4

    def tensors(self, rows: int, columns: int) -> dict[str, tuple[Shape, str]]:
        """Codes and scales."""
        return {"codes": ((rows, columns), "int8"), "scale": ((rows,), "fp32")}

    def scales(self, W: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """The largest entry of every row gets the largest code."""
        import torch

        largest = W.abs().amax(dim=1) if W.shape[1] else W.new_zeros(W.shape[0])
        return {"scale": (largest / TOP).to(torch.float32)}

    def grid(self, scales: Mapping[str, Tensor], columns: int) -> Grid:
        """Multiples of a row's scale."""
        from spectrim.linalg.rounding import Grid

        return Grid(scales["scale"][:, None].expand(-1, columns), None, -TOP, TOP)

    def pack(self, codes: Tensor) -> Tensor:
        """One code per byte."""
        import torch

        return codes.to(torch.int8)

    def unpack(self, stored: Tensor, columns: int) -> Tensor:
        """The codes as they are."""
        return stored

    def multiply(self, x: Tensor, tensors: Mapping[str, Tensor], columns: int) -> Tensor:
        """`(x qᵀ) scale`, by torch's kernel where it suits; in fp16 the restored matrix."""
        import torch

        if x.dtype == torch.float16:  # sums of codes leave its range where outputs do not
            return super().multiply(x, tensors, columns)
        codes, scale = tensors["codes"], tensors["scale"]
        if not x.requires_grad and self.reads_codes(tensors, x.dtype):  # has no gradient
            # Scales of one: the kernel would round ours to bf16, one error for a whole row.
            ones = torch.ones_like(scale, dtype=x.dtype)
            y = torch._weight_int8pack_mm(x.reshape(-1, columns), codes, ones)
            y = y.view(*x.shape[:-1], codes.shape[0])
        else:
            y = torch.nn.functional.linear(x, codes.to(x.dtype))
        return (y * scale).to(x.dtype)

    def reads_codes(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
        """By torch's kernel."""
        return _suits_kernel(tensors["codes"], dtype)

    def fast(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Where torch's kernel is fast, or ours."""
        import torch

        from spectrim.devices import has_kernel, on_host

        if not on_host(device):
            return super().fast(device, dtype)
        return dtype == torch.bfloat16 and has_kernel(KERNEL, device)

    def path(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> str:
        """The kernel's name where it runs."""
        import torch

        if dtype == torch.float16:
            return super().path(tensors, dtype)
        suits = self.reads_codes(tensors, dtype)
        return "torch's int8 kernel" if suits else "codes cast for every product"


def _suits_kernel(codes: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's int8 kernel is at hand and beats a product with restored numbers.

    It does on a CPU in bf16. In fp32 it is tens of times slower there, and on a card (H200, torch
    2.11) eleven times slower than the whole dense block at one token. With sides that are no
    multiples of 16 it was seen to read beyond its memory.
    """
    import torch

    from spectrim.devices import has_kernel, on_host

    multiples = all(side % KERNEL_MULTIPLE == 0 for side in codes.shape)
    suits = multiples and dtype == torch.bfloat16 and on_host(codes.device)
    return suits and has_kernel(KERNEL, codes.device)
