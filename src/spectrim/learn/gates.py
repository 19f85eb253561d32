"""Scores on all components of all targets as one flat vector: gates, pressure, and the death map.

    straight-through   q = 1[μ > 0]        backward 1[μ > 0] / c     starts at μ = c   (ACIP)
    relu               q = relu(μ) / c     backward 1[μ > 0] / c     starts at μ = c
    sigmoid            q = 2 sigmoid(θ)                              starts at θ = 0   (SoCo)
    softplus           q = softplus(θ + ln(e − 1))                   starts at θ = 0

Every gate is exactly 1 where it starts, so that the untrained model is the original. The gradient
of a straight-through gate is `u_iᵀ G a_i / c`, with `G` the gradient of the weight, `u_i` and `a_i`
the component: the sensitivity of the loss to the logarithm of the component, times 1/c (ACIP,
arXiv 2502.01717). The published code adds and subtracts in bf16, which leaves noise on the kept
gates, and keeps one tensor per module; here values are exact and one vector serves the model.

The death map notes the step at which a gate reached zero for the first time. Deaths are final.
Their order, ties broken by the value at death, then by the mean squared gradient, ranks all
components of the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

GateFunction = Literal["straight_through", "relu", "sigmoid", "softplus"]

ALIVE = -1
"""Death step of a gate that has not died."""

_SOFTPLUS_SHIFT = math.log(math.e - 1)

_MEMORY = 0.99
"""Decay of the mean squared gradient."""


@dataclass(frozen=True)
class Spans:
    """Where every target's components lie in the flat vector.

    Attributes:
        sizes: components per target.
    """

    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Components of the whole model."""
        return sum(self.sizes)

    def split(self, flat: Tensor) -> tuple[Tensor, ...]:
        """Views of a flat vector (N,), one per target."""
        return flat.split(list(self.sizes))

    def counts(self, mask: Tensor) -> Tensor:
        """Number of true entries per target, int64 (targets,), from one boolean vector (N,)."""
        return torch.stack([part.sum() for part in self.split(mask.long())])

    def spread(self, per_target: Sequence[float], device: torch.device | str) -> Tensor:
        """One number per target repeated over its components, fp32 (N,)."""
        sizes = torch.tensor(self.sizes, device=device)
        values = torch.tensor(per_target, dtype=torch.float32, device=device)
        return values.repeat_interleave(sizes)

    def weights(self, costs: Sequence[float], device: torch.device | str) -> Tensor:
        """Costs per component, normalized to a mean of one, fp32 (N,)."""
        spread = self.spread(costs, device)
        return spread / spread.mean()


class _StraightThrough(torch.autograd.Function):
    """Exact 0 and 1 forwards, `1/c` for open gates backwards."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, scale: float) -> Tensor:
        open_ = scores > 0
        ctx.save_for_backward(open_)
        ctx.scale = scale
        return open_.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        (open_,) = ctx.saved_tensors
        return grads[0] * open_ / ctx.scale, None


def start_value(function: GateFunction, scale: float) -> float:
    """The score at which a gate is exactly one."""
    return scale if function in ("straight_through", "relu") else 0.0


def gate_values(scores: Tensor, function: GateFunction, *, scale: float = 1.0) -> Tensor:
    """Factors on the components, same shape as the scores, differentiable.

    Args:
        scores: raw trained values.
        function: see the module.
        scale: `c`, where straight-through and relu gates start.
    """
    if function == "straight_through":
        return _StraightThrough.apply(scores, scale)  # type: ignore[return-value]
    if function == "relu":
        return torch.relu(scores) / scale
    if function == "sigmoid":
        return 2 * torch.sigmoid(scores)
    return torch.nn.functional.softplus(scores + _SOFTPLUS_SHIFT)


@dataclass
class DeathMap:
    """When every gate died, and what breaks ties.

    Attributes:
        died: step of death, `ALIVE` where it lives, int32 (N,).
        value: the score while alive, then the one at death, fp32 (N,).
        mean_square: running mean of the squared gradient while alive, fp32 (N,).
    """

    died: Tensor
    value: Tensor
    mean_square: Tensor

    @classmethod
    def fresh(cls, scores: Tensor) -> DeathMap:
        """Everything alive."""
        return cls(
            torch.full(scores.shape, ALIVE, dtype=torch.int32, device=scores.device),
            scores.detach().float().clone(),
            torch.zeros(scores.shape, dtype=torch.float32, device=scores.device),
        )

    @property
    def alive(self) -> Tensor:
        """Boolean (N,)."""
        return self.died == ALIVE

    @torch.no_grad()
    def watch(self, gradient: Tensor) -> None:
        """Take the gradient of this step into the running mean of living gates."""
        square = gradient.float().square()
        mixed = self.mean_square * _MEMORY + square * (1 - _MEMORY)
        self.mean_square.copy_(torch.where(self.alive, mixed, self.mean_square))

    @torch.no_grad()
    def record(self, scores: Tensor, step: int) -> None:
        """Note deaths after a step (1-based) and hold dead scores at exactly zero, in place.

        An optimizer's momentum would otherwise carry dead scores on, and could revive them.
        """
        alive = self.alive
        self.value.copy_(torch.where(alive, scores.float(), self.value))
        self.died[alive & (scores <= 0)] = step
        scores[~self.alive] = 0

    def keys(self, spans: Spans) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Importance keys per target: death step, value, mean squared gradient; ascending.

        Remaining ties are broken by `global_order`: the later component of a target goes first.
        """
        step = self.died.double()
        step = torch.where(self.alive, torch.full_like(step, math.inf), step)
        columns = (step, self.value.double(), self.mean_square.double())
        return list(zip(*(spans.split(c) for c in columns), strict=True))  # type: ignore[arg-type]
