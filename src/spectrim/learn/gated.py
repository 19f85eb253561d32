"""A linear layer in the basis of its components, with a gate on each: what is trained.

    y = B (q ⊙ (A x)) + b + d + s · E (F dropout(x))

`A`, `B` are the frozen factors of a full decomposition, `q` the gates bound by the trainer, `d` an
optional trained deviation (SoCo, arXiv 2502.15092) and `E F` an optional LoRA branch (ACIP, arXiv
2502.01717) with scale `s`. Nothing is rebuilt per step: shapes follow what is alive.

Components can be put in the order of their importance once; from then on the layer at rank k is a
slice, and the original module answers where the target is dense.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Lora(nn.Module):
    """A low-rank correction `s · E F`, trained in fp32; zero at the start.

    Attributes:
        down: `F`, (rank, in).
        up: `E`, (out, rank).
        scale: `s`.
    """

    def __init__(
        self, out_features: int, in_features: int, rank: int, *, scale: float, dropout: float
    ):
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, in_features))
        self.up = nn.Parameter(torch.zeros(out_features, rank))
        self.scale = scale
        self.dropout = dropout
        self.noise: int | None = None

    @property
    def rank(self) -> int:
        """Components of the correction."""
        return self.down.shape[0]

    @torch.no_grad()
    def initialize(self, generator: torch.Generator) -> None:
        """The usual start: `F` uniform within ±1/√in (Kaiming with gain 1/√3), `E` zero."""
        bound = 1 / math.sqrt(self.down.shape[1])
        drawn = torch.rand(self.down.shape, generator=generator) * 2 * bound - bound
        self.down.copy_(drawn)
        self.up.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out); drops inputs only while a seed of the noise is set."""
        if self.dropout > 0 and self.noise is not None:
            # Seeded anew at every call: a block that runs again in the backward drops the same.
            generator = torch.Generator(x.device).manual_seed(self.noise)
            drawn = torch.rand(x.shape, generator=generator, device=x.device)
            x = x * (drawn >= self.dropout).to(x.dtype) / (1 - self.dropout)
        hidden = F.linear(x, self.down.to(x.dtype))
        return F.linear(hidden, (self.up * self.scale).to(x.dtype))


class GatedLinear(nn.Module):
    """The gated layer of one target.

    Attributes:
        original: the dense module it stands for; not a submodule, so it is not saved or trained.
        up: `B`, (out, r), frozen, in the model's working dtype.
        down: `A`, (r, in).
        bias: the original's, (out,), or None.
        gate: factors on the components, (r,), bound before every forward pass.
        deviation: `d`, (out,), fp32, or None.
        lora: the correction, or None.
        rank: components used, after `order_components`; None computes the dense original.
    """

    def __init__(
        self,
        original: nn.Module,
        up: Tensor,
        down: Tensor,
        bias: Tensor | None,
        *,
        lora: Lora | None = None,
        deviation: bool = False,
    ):
        super().__init__()
        self._original = (original,)
        self.up: Tensor
        self.down: Tensor
        self.bias: Tensor | None
        self.register_buffer("up", up, persistent=False)
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.lora = lora
        self.deviation = nn.Parameter(torch.zeros(up.shape[0])) if deviation else None
        self.gate: Tensor | None = None
        self.rank: int | None = up.shape[1]
        self._used: Tensor | None = None
        self._used_factors: tuple[Tensor, Tensor] | None = None

    @property
    def original(self) -> nn.Module:
        """The dense module."""
        return self._original[0]

    @property
    def out_features(self) -> int:
        """M."""
        return self.up.shape[0]

    @property
    def in_features(self) -> int:
        """N."""
        return self.down.shape[1]

    @property
    def weight(self) -> Tensor:
        """A factor: the dtype and device probe of code that asks a linear layer for them."""
        return self.up

    @property
    def components(self) -> int:
        """r, components held."""
        return self.down.shape[0]

    def use_only(self, index: Tensor | None) -> None:
        """Compute with these components only, int64 (a,); None for all.

        The factors of the others are left out of the products, not multiplied by zero: training
        gets faster as it prunes.
        """
        self._used, self._used_factors = index, None
        if index is not None and index.numel() < self.components:
            self._used_factors = (self.up[:, index].contiguous(), self.down[index].contiguous())

    def order_components(self, index: Tensor) -> None:
        """Keep these components in this order, int64 (h,), all gates open."""
        self.use_only(None)
        self.up = self.up[:, index].contiguous()
        self.down = self.down[index].contiguous()
        self.gate, self.rank = None, index.numel()

    @torch.no_grad()
    def train_factors(self) -> list[nn.Parameter]:
        """Make both factors trainable in fp32 and return them.

        Every component is spread evenly over both, as Adam's steps do not follow a matrix's scale.
        """
        wide = torch.promote_types(self.up.dtype, torch.float32)
        up, down = self.up.to(wide), self.down.to(wide)
        norms = up.norm(dim=0), down.norm(dim=1)
        live = (norms[0] > 0) & (norms[1] > 0)
        turn = torch.where(live, norms[1] / norms[0], torch.ones_like(norms[0])).sqrt()
        self.up, self.down = nn.Parameter(up * turn), nn.Parameter(down / turn[:, None])
        return [self.up, self.down]

    @torch.no_grad()
    def settle_factors(self) -> None:
        """The end of `train_factors`: plain frozen factors in the original's dtype."""
        dtype = next(self.original.parameters()).dtype
        for name in ("up", "down"):
            trained = getattr(self, name).detach().to(dtype)
            delattr(self, name)
            self.register_buffer(name, trained, persistent=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """`(B, A)` as used now."""
        if self.rank is not None and self.rank < self.components:
            return self.up[:, : self.rank], self.down[: self.rank]
        return self._used_factors or (self.up, self.down)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.rank is None:
            return self.original(x)
        up, down = (factor.to(x.dtype) for factor in self.factors())
        hidden = F.linear(x, down)
        if self.gate is not None:
            gate = self.gate if self._used_factors is None else self.gate[self._used]
            hidden = hidden * gate.to(hidden.dtype)
        y = F.linear(hidden, up, self.bias)
        if self.deviation is not None:
            y = y + self.deviation.to(y.dtype)
        return y if self.lora is None else y + self.lora(x)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"components={self.components}, rank={self.rank}"
        )
