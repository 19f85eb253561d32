"""A target that was not cut, its matrix in integers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectrim.layers.compressed import CompressedLayer
from spectrim.layers.quantized import part_of, wide_weight
from spectrim.layers.source import Source
from spectrim.model.weights import new_linear


class QuantizedDense(CompressedLayer):
    """A target that was not cut, with coded weights.

    Attributes:
        inner: the layer itself.
        rank: None, nothing was cut.
    """

    storage = "dense"
    rank = None

    def __init__(self, inner: nn.Module):
        super().__init__(inner.in_features, inner.out_features)  # type: ignore[arg-type]
        self.inner = inner
        self.weights: str = getattr(inner, "weights", "native")

    @classmethod
    def empty(
        cls,
        in_features: int,
        out_features: int,
        rank: int | None,
        bias: bool,
        *,
        dtype: torch.dtype | None = None,
    ) -> QuantizedDense:
        """A layer on the meta device: shapes without memory, ready to be loaded into."""
        return cls(new_linear(in_features, out_features, bias, dtype=dtype))

    @classmethod
    def stored(
        cls, source: Source, rank: int | None, weights: str, *, dtype: torch.dtype
    ) -> QuantizedDense:
        """The whole matrix, rounded in the metric of its inputs."""
        options = {"dtype": dtype, "metric": source.metric}
        return cls(part_of(source.W, source.bias, weights, **options))

    @property
    def weight(self) -> Tensor:
        """The matrix, restored: a device and dtype probe for code that asks a linear layer."""
        return self.inner.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.inner.bias  # type: ignore[return-value]

    @property
    def reader(self) -> tuple[str, str]:
        """The child that reads the input, and why it must not be joined with others'."""
        return "inner", "it was not cut"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.inner(x)

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix that the layer stands for, in fp32."""
        return wide_weight(self.inner)
