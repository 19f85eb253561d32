"""4-bit weights in the order of torch's int4 kernel for CPUs.

`QuantizedLinear` restores its whole matrix for every product, since that works everywhere. On a CPU
in bf16 torch multiplies with the codes themselves, with the same scales and zero points per group
that we store (`scale · (q - 8) + zero`), once the codes lie in its own order. The kernel is part of
torch; torchao's int4 layers for CPUs call the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import ModelError
from spectrim.layers.layout import INT4_GROUP
from spectrim.layers.quantized import QuantizedLinear
from spectrim.linalg.rounding import INT4_MIDDLE, from_int4, unpacked_int4

__all__ = ["PrepackedInt4", "can_prepack_int4"]

OUT_MULTIPLE = 16
"""The kernel's rows come in blocks of this many."""

_HAS_KERNEL = hasattr(torch, "_weight_int4pack_mm_for_cpu")


def can_prepack_int4(linear: QuantizedLinear) -> bool:
    """Whether torch's kernel multiplies with these codes and is the faster way to."""
    return (
        _HAS_KERNEL
        and linear.weights == "int4"
        and linear.codes.device.type == "cpu"
        # In fp32 the kernel is tens of times slower than restoring the matrix.
        and linear.dtype == torch.bfloat16
        and linear.out_features % OUT_MULTIPLE == 0
        and linear.codes.numel() > 0
    )


class PrepackedInt4(nn.Module):
    """Stands in for a `QuantizedLinear` with int4 weights, for running only.

    Attributes:
        bias: (out,) or None.
        weights: `int4`.
        dtype: bf16.
    """

    weights = "int4"

    def __init__(self, linear: QuantizedLinear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.dtype
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        codes = unpacked_int4(linear.codes).to(torch.int32)  # (out, groups * 32)
        self._padding = codes.shape[1] - self.in_features
        self._packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        pairs = torch.stack([linear.scale, linear.zero], dim=-1)  # (out, groups, 2)
        self._pairs = pairs.transpose(0, 1).contiguous()
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in), restored in bf16."""
        return self.wide_weight().to(self.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        return self._packed.numel() + self._pairs.numel() * self._pairs.element_size()

    def wide_weight(self) -> Tensor:
        """The matrix (out, in) in fp32, without further rounding."""
        stored = self._stored()
        return from_int4(stored["codes"], stored["scale"], stored["zero"], self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        flat = nn.functional.pad(x.reshape(-1, self.in_features), (0, self._padding))
        y = torch._weight_int4pack_mm_for_cpu(flat, self._packed, INT4_GROUP, self._pairs)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, weights=int4, "
            f"bias={self.bias is not None}"
        )

    def _stored(self) -> dict[str, Tensor]:
        """Codes, scales and zero points as `QuantizedLinear` keeps them."""
        # The kernel's order differs between processors, so it is undone by the kernel itself: with
        # scales of one and zero points of zero the unit vectors give q - 8, which bf16 holds.
        size = self.in_features + self._padding
        unit = torch.eye(size, dtype=self.dtype)
        plain = torch.zeros_like(self._pairs)
        plain[..., 0] = 1
        values = torch._weight_int4pack_mm_for_cpu(unit, self._packed, INT4_GROUP, plain).mT
        codes = (values + INT4_MIDDLE).to(torch.uint8)  # (out, groups * 32)
        scale, zero = self._pairs.transpose(0, 1).unbind(dim=-1)
        return {
            "codes": codes[:, 0::2] | (codes[:, 1::2] << 4),
            "scale": scale.contiguous(),
            "zero": zero.contiguous(),
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        probe = fn(torch.empty(0, dtype=self.dtype))
        if (probe.dtype, probe.device.type) != (self.dtype, "cpu"):
            raise ModelError(
                f"prepacked int4 weights stay in bfloat16 on a CPU, they cannot become "
                f"{probe.dtype} on {probe.device}; cast or move the model first and prepack it then"
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._stored().items():
            destination[f"{prefix}{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        error_msgs.append(f"{prefix}codes is prepacked for a kernel; load first and prepack then")
