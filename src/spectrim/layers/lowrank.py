"""A linear layer of rank k as two plain linear layers: `y = B (A x) + b`.

`A` is `down` (k, in), `B` is `up` (out, k). Both are ordinary `nn.Linear` modules, so everything
that knows linear layers (quantisation, LoRA, weight initialisation, compilation) knows the
factors without being told about spectrim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectrim.layers.compressed import CompressedLayer, copied_parameter
from spectrim.layers.layout import layout_of
from spectrim.layers.quantized import QuantizedLinear, part_of, wide_weight
from spectrim.layers.source import Source
from spectrim.linalg.least_squares import solve_damped
from spectrim.model.weights import new_linear
from spectrim.tolerances import LEAST_SQUARES_RIDGE


class LowRankLinear(CompressedLayer):
    """`up(down(x))`, the factored storage of a rank-k matrix.

    Attributes:
        down: (rank, in_features), without bias.
        up: (out_features, rank), with the bias of the layer it stands for.
    """

    storage = "factored"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(in_features, out_features)
        self.rank = rank
        self.down = new_linear(in_features, rank, False, device, dtype)
        self.up = new_linear(rank, out_features, bias, device, dtype)

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
        layer.up.weight = copied_parameter(up, dtype, device)
        layer.down.weight = copied_parameter(down, dtype, device)
        if bias is not None:
            layer.up.bias = copied_parameter(bias, dtype, device)
        return layer

    @classmethod
    def stored(
        cls, source: Source, rank: int | None, weights: str, *, dtype: torch.dtype
    ) -> LowRankLinear:
        """The factors of `source`, rounded one after the other.

        The first is rounded where the second is orthonormal in G: rows of `down` have scales of
        their own, so that the sizes of the components cost nothing there. The second is solved
        for again behind the rounded first, and rounded in the metric of what that passes on.
        """
        assert source.factors is not None
        up, down = source.factors
        first, second = (one.name for one in layout_of("factored", weights).formats.values())
        if not layout_of("factored", weights).coded:
            return cls.from_factors(up, down, source.bias, dtype=dtype, device=up.device)
        pairs = _Pairs(source, first, second, dtype)
        up, down = source.orthonormal(up, down)
        best = pairs.rounded(up, down)
        # One alternation; nothing is monotone here, so the better pair stays.
        again = pairs.rounded(wide_weight(best.up).double(), pairs.resolved_down(best.up))
        best = min(best, again, key=pairs.loss)
        layer = cls.empty(down.shape[1], up.shape[0], up.shape[1], source.bias is not None)
        layer.up, layer.down, layer.weights = best.up, best.down, weights
        return layer

    reader = ("down", "")
    """The child that reads the input, and why it must not be joined with others'."""

    expander = "up"
    """The child whose input is the latent; empty where no child's is."""

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

    def factors(self) -> tuple[Tensor, Tensor]:
        """`up` (out, k) and `down` (k, in) in fp32 or better."""
        return wide_weight(self.up), wide_weight(self.down)

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix that the layer stands for, multiplied in fp32 or better."""
        up, down = self.factors()
        return up @ down

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class _Pair(NamedTuple):
    up: nn.Linear | QuantizedLinear
    down: nn.Linear | QuantizedLinear


@dataclass(frozen=True)
class _Pairs:
    """How pairs of factors of one source are rounded and compared."""

    source: Source
    up_weights: str
    down_weights: str
    dtype: torch.dtype

    def rounded(self, start: Tensor, down: Tensor) -> _Pair:
        """`down` rounded on the inputs, `up` solved for behind it and rounded there."""
        source, dtype = self.source, self.dtype
        A = part_of(down, None, self.down_weights, dtype=dtype, metric=source.metric)
        first = wide_weight(A).double()
        up, metric = source.refitted(start, first), source.metric_behind(first)
        return _Pair(part_of(up, source.bias, self.up_weights, dtype=dtype, metric=metric), A)

    def resolved_down(self, up: nn.Module) -> Tensor:
        """The best `down` behind a rounded `up`: `(Bᵀ G B)⁻¹ Bᵀ G W`."""
        B = wide_weight(up).double()
        left = B.mT if self.source.G is None else B.mT @ self.source.G.to(B)
        return solve_damped(
            left @ B, left @ self.source.W, name=self.source.name, ridge=LEAST_SQUARES_RIDGE
        )

    def loss(self, pair: _Pair) -> float:
        return self.source.loss(wide_weight(pair.up).double() @ wide_weight(pair.down).double())
