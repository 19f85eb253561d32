"""What all layers that replace a linear layer have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def copied_parameter(
    tensor: Tensor, dtype: torch.dtype, device: torch.device | str
) -> nn.Parameter:
    """A parameter with memory of its own."""
    return nn.Parameter(tensor.detach().to(device=device, dtype=dtype, copy=True).contiguous())


class CompressedLayer(nn.Module):
    """A layer that stands for a linear layer.

    Attributes:
        in_features: width of its input.
        out_features: width of its output.
        transposed: True where it replaced a module that stores (in, out), transformers' `Conv1D`.
    """

    is_compressed_layer = True
    storage: str
    weights = "native"

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = False

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        *,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """A layer on the meta device: shapes without memory, ready to be loaded into."""
        kind: Any = cls
        return kind(in_features, out_features, rank, bias, device="meta", dtype=dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set as usual; what is derived from the parts can only be set to what it is.

        PEFT gives every layer that it unwraps its own weight and bias once more.
        """
        if not isinstance(getattr(type(self), name, None), property):
            super().__setattr__(name, value)
            return
        own = getattr(self, name)
        if own is not value and not (isinstance(value, Tensor) and torch.equal(own, value)):
            raise AttributeError(
                f"{name} of a {type(self).__name__} follows from its parts; set those"
            )
