"""A linear layer of rank k as two plain linear layers: `y = B (A x) + b`.

`A` is `down` (k, in), `B` is `up` (out, k). Both are ordinary `nn.Linear` modules, so everything
that knows linear layers (quantisation, LoRA, weight initialisation, compilation) knows the
factors without being told about spectrim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectrim.layers.quantized import wide_weight

__all__ = ["LowRankLinear"]


class LowRankLinear(nn.Module):
    """`up(down(x))`, the factored storage of a rank-k matrix.

    Attributes:
        down: (rank, in_features), without bias.
        up: (out_features, rank), with the bias of the layer it stands for.
        transposed: True where it replaced a module that stores (in, out), transformers' `Conv1D`.
    """

    is_compressed_layer = True
    storage = "factored"
    weights = "native"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.transposed = False
        self.down = nn.Linear(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device=device, dtype=dtype)

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        *,
        dtype: torch.dtype | None = None,
    ) -> LowRankLinear:
        """A layer on the meta device: shapes without memory, ready to be loaded into."""
        return cls(in_features, out_features, rank, bias, device="meta", dtype=dtype)

    @classmethod
    def from_factors(
        cls,
        up: Tensor,
        down: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> LowRankLinear:
        """Build from `up` (out, k), `down` (k, in) and the bias (out,) in any dtype.

        The factors arrive in the precision they were computed in and are rounded to the model's
        dtype here, once; the layer shares no memory with them.
        """
        if up.ndim != 2 or down.ndim != 2 or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"up {tuple(up.shape)} and down {tuple(down.shape)} are not (out, k) and (k, in)"
            )
        layer = cls.empty(down.shape[1], up.shape[0], up.shape[1], bias is not None, dtype=dtype)
        layer.up.weight = _parameter(up, dtype, device)
        layer.down.weight = _parameter(down, dtype, device)
        if bias is not None:
            layer.up.bias = _parameter(bias, dtype, device)
        return layer

    @property
    def weight(self) -> Tensor:
        """The up factor: a device and dtype probe for code that asks a linear layer for them."""
        return self.up.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.up(self.down(x))

    def latent(self, x: Tensor) -> Tensor:
        """The k numbers per token from which the output follows: (..., in) -> (..., k)."""
        return self.down(x)

    def expand(self, latent: Tensor) -> Tensor:
        """The output from what `latent` returned: (..., k) -> (..., out)."""
        return self.up(latent)

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix that the layer stands for, multiplied in fp32 or better."""
        return wide_weight(self.up) @ wide_weight(self.down)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _parameter(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> nn.Parameter:
    copied = tensor.detach().to(device=device, dtype=dtype, copy=True)
    return nn.Parameter(copied.contiguous())
