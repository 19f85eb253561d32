"""Compressed layers whose products of a few tokens are one launch each.

The classes add no tensor and change no name: a layer becomes one of them and is the same layer in
every other respect. With many tokens, with gradients, and where another module stands for a part
(joined inputs, integers), the ordinary operators run.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.devices import runs_triton
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear

FEW = 8
"""Tokens up to which every weight is read once per token from a cache; above it products of
matrices are better at it."""


def _suits(x: Tensor, *parts: nn.Module) -> bool:
    plain = all(type(part) is nn.Linear and part.weight.dtype == x.dtype for part in parts)
    return plain and not torch.is_grad_enabled() and 0 < x.numel() <= FEW * x.shape[-1]


def _rows(x: Tensor, part: Any, mode: int = 0, order: Tensor | None = None, **more: Any) -> Tensor:
    from spectrim.serve.triton_rows import rows

    bias, rank = more.get("bias"), more.get("rank", 0)
    y = rows(x.reshape(-1, x.shape[-1]), part.weight, order, bias, rank, mode)
    return y.view(*x.shape[:-1], y.shape[-1])


class QuickLowRank(LowRankLinear):
    """`LowRankLinear` with two launches for a few tokens."""

    def latent(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., k)."""
        return _rows(x, self.down) if _suits(x, self.down) else super().latent(x)

    def expand(self, latent: Tensor) -> Tensor:
        """(..., k) -> (..., out)."""
        if not _suits(latent, self.up):
            return super().expand(latent)
        return _rows(latent, self.up, bias=self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.expand(self.latent(x))


class QuickPacked(PackedLinear):
    """`PackedLinear` with two launches for a few tokens: its order is read, nothing is gathered."""

    def latent(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., k)."""
        if not _suits(x, self.basis, self.coefficients):
            return super().latent(x)
        if self.side == "out":
            return _rows(x, self.basis)
        return _rows(x, self.coefficients, 1, self.order, rank=self.rank)

    def expand(self, latent: Tensor) -> Tensor:
        """(..., k) -> (..., out)."""
        if not _suits(latent, self.coefficients if self.side == "out" else self.basis):
            return super().expand(latent)
        if self.side == "in":
            return _rows(latent, self.basis, bias=self.bias)
        options = {"rank": self.rank, "bias": self.bias}
        return _rows(latent, self.coefficients, 2, self.order, **options)


_QUICK: dict[type, type] = {LowRankLinear: QuickLowRank, PackedLinear: QuickPacked}


def obstacle(device: torch.device) -> str:
    """Why the kernel cannot run on a device, empty if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    return "" if runs_triton(device) else f"Triton makes no kernels for {device.type} here"


def quick(layer: nn.Module) -> bool:
    """Let a layer use the kernel, in place; False for layers that have no use for it."""
    made = _QUICK.get(type(layer))
    if made is None or getattr(layer, "weights", "") != "native":
        return False
    layer.__class__ = made
    return True
