"""A rounded matrix and what it got wrong: `y = Q x + B (A x) + b`, B A of a small rank.

The base `Q` (out, in) holds codes of few bits, `B` (out, k) and `A` (k, in) finer ones. With the
moments C of the inputs and G of the output gradients both minimise `½ tr(G E C Eᵀ)` in turn:
Q rounds `W - B A` with feedback in C, and B A is the best rank-k matrix for `W - Q` in both (the
residual of LQER, arXiv 2402.02446, and QERA, arXiv 2410.06040, with G; the alternation of CALDERA,
arXiv 2405.18886). Beginning with the leading components of W instead of an empty residual mostly
ends lower: they carry what is large, and what is left for the codes is smaller and more alike.
Nothing is monotone here, so the best pair stays.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from spectrim.formats import JOINT
from spectrim.layers.compressed import CompressedLayer
from spectrim.layers.layout import layout_of
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.quantized import QuantizedLinear, part_of, wide_weight
from spectrim.layers.source import Source
from spectrim.model.weights import new_linear

TURNS = 2
"""Times that the base is rounded again behind the factors; each gains less than the one before."""


class ResidualLinear(CompressedLayer):
    """A rounded matrix beside a low-rank correction.

    Attributes:
        base: (out, in), with the bias of the layer it stands for.
        up: (out, rank), without bias.
        down: (rank, in), without bias.
    """

    storage = "residual"

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
        self.base = new_linear(in_features, out_features, bias, device, dtype)
        self.up = new_linear(rank, out_features, False, device, dtype)
        self.down = new_linear(in_features, rank, False, device, dtype)

    @classmethod
    def stored(
        cls, source: Source, rank: int | None, weights: str, *, dtype: torch.dtype
    ) -> ResidualLinear:
        """The base rounded in the metric of the inputs, its residual in both, and in turns."""
        assert rank is not None
        coarse, *fine = (one.name for one in layout_of("residual", weights).formats.values())
        base, rest = min(
            _turns(source, rank, coarse, dtype), key=lambda turn: turn[1].loss(_product(turn[1]))
        )
        layer = cls.empty(source.W.shape[1], source.W.shape[0], rank, source.bias is not None)
        layer.base, layer.weights = base, weights
        pair = LowRankLinear.stored(rest, rank, JOINT.join(fine), dtype=dtype)
        layer.up, layer.down = pair.up, pair.down
        return layer

    reader = ("down", "its base reads the input too")
    """The child that reads the input, and why it must not be joined with others'."""

    @property
    def weight(self) -> Tensor:
        """The up factor: a device and dtype probe for code that asks a linear layer for them."""
        return self.up.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), or None."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.base(x) + self.up(self.down(x))

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix that the layer stands for, added up in fp32 or better."""
        return wide_weight(self.base) + wide_weight(self.up) @ wide_weight(self.down)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def _turns(
    source: Source, rank: int, weights: str, dtype: torch.dtype
) -> Iterator[tuple[nn.Linear | QuantizedLinear, Source]]:
    """Bases, each with what it leaves and the best factors for that."""

    def beside(product: Tensor) -> tuple[nn.Linear | QuantizedLinear, Source]:
        options = {"dtype": dtype, "metric": source.metric}
        base = part_of(source.W - product, source.bias, weights, **options)
        return base, source.beside(wide_weight(base).double(), rank)

    yield beside(torch.zeros_like(source.W))
    product = torch.mm(*source.leading(rank))
    for _ in range(1 + TURNS):
        base, rest = beside(product)
        product = _product(rest)
        yield base, rest


def _product(source: Source) -> Tensor:
    assert source.factors is not None
    return torch.mm(*source.factors)
