"""Integer weights in the order of their format's kernel.

`QuantizedLinear` works everywhere with what is stored. Where the format has a kernel that wants the
codes in an order of its own, this layer keeps them so, for running only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.errors import ModelError
from spectrim.layers.quantized import QuantizedLinear


def can_prepack_codes(linear: QuantizedLinear) -> bool:
    """Whether a kernel multiplies with these codes and is the faster way to."""
    kernel = linear.format.kernel
    return kernel is not None and not kernel.obstacle(
        linear.stored, linear.in_features, linear.dtype
    )


class PrepackedCodes(nn.Module):
    """Stands in for a `QuantizedLinear`.

    Attributes:
        bias: (out,) or None.
        weights: name of the number format.
        dtype: of the model around it.
    """

    def __init__(self, linear: QuantizedLinear):
        super().__init__()
        assert linear.format.kernel is not None
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weights, self.format, self.kernel = linear.weights, linear.format, linear.format.kernel
        self.dtype = linear.dtype
        self.bias = None if linear.bias is None else linear.bias.requires_grad_(False)
        self._packed = self.kernel.pack(linear.stored)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in), restored in the model's dtype."""
        return self.wide_weight().to(self.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors in the kernel's order."""
        return sum(t.numel() * t.element_size() for t in self._packed.values())

    def wide_weight(self) -> Tensor:
        """The matrix (out, in) in fp32, without further rounding."""
        return self.format.decode(self.kernel.unpack(self._packed), self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.kernel.multiply(x.reshape(-1, self.in_features), self._packed)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"weights={self.weights}, bias={self.bias is not None}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        place = next(iter(self._packed.values())).device
        probe = fn(torch.empty(0, dtype=self.dtype, device=place))
        if (probe.dtype, probe.device) != (self.dtype, place):
            raise ModelError(
                f"prepacked {self.weights} weights stay in {self.dtype} on {place}, they cannot "
                f"become {probe.dtype} on {probe.device}; cast or move the model first and prepack "
                "it then"
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.kernel.unpack(self._packed).items():
            destination[f"{prefix}{name}"] = tensor

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *told: Any) -> None:
        # Local metadata, strictness, then lists: missing keys, unexpected keys, errors.
        told[-1].append(f"{prefix}codes is prepacked for a kernel; load first and prepack then")
