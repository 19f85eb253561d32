"""The second moments that calibration leaves behind, as plain records that add up exactly."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor


def _added(left: Any, right: Any) -> list[Any]:
    """Sums field by field; shares of an expert's pool are means over the tokens."""
    sums = {f.name: _add(getattr(left, f.name), getattr(right, f.name)) for f in fields(left)}
    if sums["pooled"] is not None:
        parts = sum(one.pooled * one.tokens for one in (left, right))
        sums["pooled"] = parts / sums["tokens"] if sums["tokens"] else 1.0
    return list(sums.values())


def _add(left: Any, right: Any) -> Any:
    if (left is None) != (right is None):
        raise ValueError("only moments that hold the same statistics can be merged")
    return None if left is None else left + right


@dataclass(frozen=True)
class Moments:
    """Sums over the calibration tokens of one group; `x` is its input, `x'` the shifted input.

    All matrices are sums, not means, so that batches, processes and machines add up.

    Attributes:
        tokens: number of tokens that were summed.
        C: `Σ x xᵀ`, shape (in, in), fp64, or None when only shifted inputs were seen.
        shifted: `Σ x' x'ᵀ`, shape (in, in), or None when no shifted stream was run.
        cross: `D = Σ x x'ᵀ`, shape (in, in), rows original, columns shifted.
        absolute: `Σ |x|`, shape (in,).
        deficit: `Σ r x'ᵀ`, shape (out, in), of a group of one target W that adds its output to the
            residual stream h: `r = W (x − x') + h − h'` is what the stream behind the sum lacks.
        deficit_square: `Σ r rᵀ`, shape (out, out).
        pooled: share of an expert's moments that comes from all experts, 1 where it saw no token;
            None for what every token passes.
    """

    tokens: int
    C: Tensor | None
    shifted: Tensor | None = None
    cross: Tensor | None = None
    absolute: Tensor | None = None
    deficit: Tensor | None = None
    deficit_square: Tensor | None = None
    pooled: float | None = None

    @property
    def in_features(self) -> int:
        """Width of the group's input."""
        known = self.C if self.C is not None else self.shifted
        if known is None:
            raise ValueError("these moments hold no second moment")
        return known.shape[0]

    def merge(self, other: Moments) -> Moments:
        """Exact addition of two sets of moments of the same group."""
        return Moments(*_added(self, other))


@dataclass(frozen=True)
class OutputMoments:
    """Sums over calibration of the loss gradients of one target.

    The loss is the summed (not mean) next-token cross-entropy in nats, so that the matrices are
    sums over tokens and windows of per-token and per-window quantities.

    Attributes:
        tokens: number of tokens that were summed into `G`; those that are not routed to an expert
            count, with a gradient of zero.
        windows: number of windows that were summed into the Fisher weights and the gradient.
        G: `Σ g gᵀ`, shape (out, out), `g` the gradient with respect to one token's output.
        fisher_in: `Σ_windows Σ_out (∂L/∂W)²`, shape (in,).
        fisher_out: `Σ_windows Σ_in (∂L/∂W)²`, shape (out,).
        gradient: `Σ_windows ∂L/∂W`, shape (out, in).
        pooled: see `Moments`.
    """

    tokens: int
    windows: int
    G: Tensor | None = None
    fisher_in: Tensor | None = None
    fisher_out: Tensor | None = None
    gradient: Tensor | None = None
    pooled: float | None = None

    def merge(self, other: OutputMoments) -> OutputMoments:
        """Exact addition of two sets of gradient moments of the same target."""
        return OutputMoments(*_added(self, other))


Record = TypeVar("Record", Moments, OutputMoments)
