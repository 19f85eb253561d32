"""A linear layer of rank k that stores `k(m+n-k)` numbers: factored storage without its gauge.

    side out (m <= n):  y = P [y_p; y_n],  y_p = basis x,  y_n = coefficients y_p
    side in  (m > n):   y = basis (x_p + coefficients x_n),  [x_p; x_n] = P x

`P` is a permutation, stored as the int32 index of one gather. The pivots always lie on the smaller
side, so the gather is as short as it can be and the shapes tell the side. `basis` and
`coefficients` are plain `nn.Linear` modules for the same reasons as the factors of
`LowRankLinear`. How the pivots are chosen is in `linalg/pivot.py` (arXiv 2501.19090).

Packing is exact in exact arithmetic, but it rounds 3 to 4 times as much as plain factors do,
because the coefficients pass on the noise of the basis. A run measures it, and stores a
target otherwise where that is the better use of its bytes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from spectrim.devices import on_host
from spectrim.layers.compressed import CompressedLayer, copied_parameter
from spectrim.layers.layout import layout_of
from spectrim.layers.quantized import part_of, wide_weight
from spectrim.layers.source import Source
from spectrim.linalg.pivot import Packed, Side, pack, packed_side
from spectrim.model.weights import new_linear


class PackedLinear(CompressedLayer):
    """The packed storage of a rank-k matrix.

    Attributes:
        basis: (k, in) on side `out`, (out, k) on side `in`; without bias.
        coefficients: (out-k, k) on side `out`, (k, in-k) on side `in`; without bias.
        order: int32 gather index. Side `out`: for every output its place in `[y_p; y_n]`, length
            out. Side `in`: the inputs of `[x_p; x_n]` in turn, length in.
        bias: (out,) or None.
    """

    storage = "packed"
    order: Tensor

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
        self.side: Side = packed_side(out_features, in_features)
        m, n = out_features, in_features
        outside = self.side == "out"
        basis = (n, rank) if outside else (rank, m)
        coefficients = (rank, m - rank) if outside else (n - rank, rank)
        self.basis = new_linear(*basis, False, device, dtype)
        self.coefficients = new_linear(*coefficients, False, device, dtype)
        self.register_buffer("order", torch.arange(min(m, n), dtype=torch.int32, device=device))
        self.bias = nn.Parameter(torch.zeros(m, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_factors(
        cls,
        up: Tensor,
        down: Tensor,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> PackedLinear:
        """Pack `up` (out, k) and `down` (k, in) in fp64 and round the parts to `dtype`, once."""
        packed = pack(up, down)
        return cls.from_packed(packed, bias, dtype=dtype, device=device)

    @classmethod
    def from_packed(
        cls,
        packed: Packed,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> PackedLinear:
        """Build from parts that were packed before, on the side that the layer uses.

        Raises:
            ValueError: the parts were pivoted on the larger side.
        """
        m, n = packed.shape
        if packed.side != packed_side(m, n):
            raise ValueError(
                f"a {m} x {n} layer is pivoted on side {packed_side(m, n)!r}, "
                f"these parts on side {packed.side!r}"
            )
        layer = cls.empty(n, m, packed.rank, bias is not None, dtype=dtype)
        layer.basis.weight = copied_parameter(packed.basis, dtype, device)
        layer.coefficients.weight = copied_parameter(packed.coefficients, dtype, device)
        # Outputs are gathered from their packed places, inputs into them: inverse orders.
        order = packed.order.argsort() if packed.side == "out" else packed.order
        layer.order = order.to(device=device, dtype=torch.int32, copy=True)
        if bias is not None:
            layer.bias = copied_parameter(bias, dtype, device)
        return layer

    @classmethod
    def stored(
        cls, source: Source, rank: int | None, weights: str, *, dtype: torch.dtype
    ) -> PackedLinear:
        """The factors of `source`, packed and rounded; the second part makes up for the first."""
        assert source.factors is not None
        up, down = source.factors
        parts = pack(up, down)
        if not layout_of("packed", weights).coded:
            return cls.from_packed(parts, source.bias, dtype=dtype, device=up.device)
        layer = cls.from_packed(parts, None, dtype=torch.float64, device=up.device)
        layer.bias = (
            None if source.bias is None else copied_parameter(source.bias, dtype, up.device)
        )
        basis, coefficients = (one.name for one in layout_of("packed", weights).formats.values())
        layer.weights = weights
        if parts.side == "out":
            layer.basis = part_of(parts.basis, None, basis, dtype=dtype, metric=source.metric)
            first = wide_weight(layer.basis).double()
            # The rows that are not the basis itself.
            W = source.W[parts.order.long()[parts.rank :]]
            solved = source.refitted(parts.coefficients, first, W)
            metric = source.metric_behind(first)
            layer.coefficients = part_of(solved, None, coefficients, dtype=dtype, metric=metric)
            return layer
        layer.coefficients = part_of(parts.coefficients, None, coefficients, dtype=dtype)
        rest = wide_weight(layer.coefficients).double()
        gathered = torch.cat([torch.eye(parts.rank).to(rest), rest], dim=1)
        first = torch.empty_like(gathered)
        first[:, parts.order.long()] = gathered
        solved, metric = source.refitted(parts.basis, first), source.metric_behind(first)
        layer.basis = part_of(solved, None, basis, dtype=dtype, metric=metric)
        return layer

    @property
    def reader(self) -> tuple[str, str]:
        """The child that reads the input, and why it must not be joined with others'."""
        inside = "packed on the in-side, it gathers its input first"
        return "basis", inside if self.side == "in" else ""

    @property
    def expander(self) -> str:
        """The child whose input is the latent; empty on the in-side, where no child's is."""
        return "coefficients" if self.side == "out" else ""

    @property
    def weight(self) -> Tensor:
        """The basis: a device and dtype probe for code that asks a linear layer for them."""
        return self.basis.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return self.expand(self.latent(x))

    def latent(self, x: Tensor) -> Tensor:
        """The k numbers per token from which the output follows: (..., in) -> (..., k)."""
        if self.side == "out":
            return self.basis(x)
        x = _gather(x, self.order)
        return x[..., : self.rank] + self.coefficients(x[..., self.rank :])

    def expand(self, latent: Tensor) -> Tensor:
        """The output from what `latent` returned: (..., k) -> (..., out)."""
        if self.side == "out":
            y = torch.cat([latent, self.coefficients(latent)], dim=-1)
            y = _gather(y, self.order)
        else:
            y = self.basis(latent)
        return y if self.bias is None else y + self.bias

    def packed(self) -> Packed:
        """The stored parts as a record, in the stored dtype."""
        order = self.order.argsort() if self.side == "out" else self.order
        return Packed(
            self.basis.weight.detach(),
            self.coefficients.weight.detach(),
            order.to(torch.int32),
            self.side,
        )

    def factors(self) -> tuple[Tensor, Tensor]:
        """`up` (out, k) and `down` (k, in) in fp32 or better: a product without its order."""
        basis, coefficients = wide_weight(self.basis), wide_weight(self.coefficients)
        one = torch.eye(self.rank).to(basis)
        if self.side == "out":
            return torch.cat([one, coefficients])[self.order.long()], basis
        return basis, torch.cat([one, coefficients], 1)[:, self.order.long().argsort()]

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix that the layer stands for, multiplied in fp32 or better."""
        parts = replace(
            self.packed(),
            basis=wide_weight(self.basis),
            coefficients=wide_weight(self.coefficients),
        )
        return parts.product()

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, side={self.side}"
        )


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """`x[..., order]`, the way that is fast: (..., features) -> (..., features)."""
    size = x.shape[-1]
    if x.numel() == size:
        # One token: everything but the plainest selection costs more in calls than it moves.
        return x.reshape(size).index_select(0, order).view(x.shape)
    # On a CPU a gather along the last of three axes takes several times longer than of two, and in
    # half precision `index_select` takes twenty times longer than `gather` of numbers of two bytes.
    flat = x.reshape(-1, size)
    if on_host(x.device) and x.element_size() == 2:
        places = order.long().expand(flat.shape[0], -1)
        if x.requires_grad and torch.is_grad_enabled():
            y = flat.gather(1, places)
        else:  # a view of other numbers has no gradient
            y = flat.view(torch.int16).gather(1, places).view(x.dtype)
    else:
        y = flat.index_select(1, order)
    return y.view(x.shape)
