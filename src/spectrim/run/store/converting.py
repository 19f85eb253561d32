"""One finished target into the form in which it is stored, and what that rounds away.

The layer arrives factored (or dense) in the working precision. Errors are relative to what it
computes there, `‖E X‖ / ‖W X‖` on the moments' inputs or in Frobenius norms without moments.

Integer formats round one matrix after the other: the second is re-solved by least squares on the
inputs as the rounded first one passes them on, from where it was (directions without data stay),
and rounded last.

A packed layer that rounds more than `PACKED_ERROR_SHARE` of what the cut cost is compared with the
factored layer of the same bytes, which has a smaller rank; the better of the two is stored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectrim.allocate.budget import Shape, bytes_by_rank
from spectrim.allocate.plan import PlanEntry, Storage
from spectrim.decompose import decompose
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import (
    QuantizedDense,
    QuantizedLinear,
    quantize_layer,
    rounded,
    wide_weight,
)
from spectrim.linalg.least_squares import least_squares_map
from spectrim.linalg.pivot import Packed, pack
from spectrim.model.weights import read_bias, read_weight
from spectrim.moments.moments import Moments
from spectrim.tolerances import LEAST_SQUARES_RIDGE, PACKED_ERROR_SHARE

__all__ = ["Conversion", "Converter"]


@dataclass(frozen=True)
class Conversion:
    """A layer as it will be stored.

    Attributes:
        layer: the module, None once the model has it.
        storage: as carried out.
        rank: as carried out, None for a dense target.
        error: relative error of the layer against what it was before.
        note: why it is not stored as planned, or rounds more than it should.
    """

    layer: Any
    storage: Storage
    rank: int | None
    error: float
    note: str | None = None


@dataclass(frozen=True)
class Converter:
    """How one target is to be stored.

    Attributes:
        entry: of the plan.
        dtype: of the checkpoint, in which native numbers and biases are stored.
        moments: of the target's inputs in the finished network, None without data.
        truncation: relative error of the cut as a ratio of norms, None where it is not known.
    """

    entry: PlanEntry
    dtype: torch.dtype
    moments: Moments | None = None
    truncation: float | None = None

    @property
    def C(self) -> Tensor | None:
        """Second moment of the inputs, (in, in)."""
        return None if self.moments is None else self.moments.C

    def convert(self, layer: Any) -> Conversion:
        """The stored form of a layer: a dense one, or a `LowRankLinear` of the planned rank.

        Raises:
            NumericalError: a matrix cannot be packed or solved for; names the target.
        """
        if self.entry.rank is None:
            return self._dense(layer)
        up, down = wide_weight(layer.up).double(), wide_weight(layer.down).double()
        if self.entry.storage == "factored":
            stored = self._factored(up, down, layer.bias)
            error = self._error(up @ down, stored)
            return Conversion(stored, "factored", self.entry.rank, error)
        return self._packed_or_better(up, down, layer.bias)

    def _dense(self, layer: Any) -> Conversion:
        W, weights = read_weight(layer).detach(), self.entry.weights
        inner = QuantizedLinear.from_weight(W, read_bias(layer), weights, dtype=self.dtype)
        stored = QuantizedDense(inner)
        return Conversion(stored, "dense", None, self._error(W.double(), stored))

    def _factored(self, up: Tensor, down: Tensor, bias: Tensor | None) -> LowRankLinear:
        if self.entry.weights == "native":
            return LowRankLinear.from_factors(up, down, bias, dtype=self.dtype, device=up.device)
        # All rows of `up` share the range of their columns, so the columns get equal lengths;
        # the rows of `down` have scales of their own.
        W = up @ down
        start, R = torch.linalg.qr(up)
        down = R @ down
        up = self._resolved(start, W, rounded(down, self.entry.weights, self.dtype))
        layer = LowRankLinear.from_factors(up, down, bias, dtype=torch.float64, device=up.device)
        return quantize_layer(layer, self.entry.weights, dtype=self.dtype)

    def _resolved(self, start: Tensor, W: Tensor, first: Tensor) -> Tensor:
        """The map (m, k) from what `first` (k, n) passes on to `W` (m, n), on the inputs."""
        seen = first if self.C is None else first @ self.C.to(first)
        solved, _ = least_squares_map(
            W @ seen.mT,
            first @ seen.mT,
            start=start,
            name=self.entry.name,
            ridge=LEAST_SQUARES_RIDGE,
        )
        return solved

    def _packed(self, up: Tensor, down: Tensor, bias: Tensor | None) -> PackedLinear:
        parts = pack(up, down)
        if self.entry.weights == "native":
            return PackedLinear.from_packed(parts, bias, dtype=self.dtype, device=up.device)
        parts = self._resolved_parts(parts)
        layer = PackedLinear.from_packed(parts, bias, dtype=torch.float64, device=up.device)
        return quantize_layer(layer, self.entry.weights, dtype=self.dtype)

    def _resolved_parts(self, parts: Packed) -> Packed:
        """The packed form whose second matrix makes up for the rounding of the first."""
        weights = self.entry.weights
        if parts.side == "out":
            basis = rounded(parts.basis, weights, self.dtype)
            solved = self._resolved(parts.coefficients, parts.coefficients @ parts.basis, basis)
            return replace(parts, coefficients=solved)
        rest = rounded(parts.coefficients, weights, self.dtype)
        gathered = torch.cat([torch.eye(parts.rank).to(rest), rest], dim=1)
        first = torch.empty_like(gathered)
        first[:, parts.order.long()] = gathered
        return replace(parts, basis=self._resolved(parts.basis, parts.product(), first))

    def _packed_or_better(self, up: Tensor, down: Tensor, bias: Tensor | None) -> Conversion:
        entry, W = self.entry, up @ down
        stored = self._packed(up, down, bias)
        error = self._error(W, stored)
        packed = Conversion(stored, "packed", entry.rank, error)
        if self.truncation is not None and error <= PACKED_ERROR_SHARE * self.truncation:
            return packed
        other = self._of_same_bytes(W, bias)
        cost = "an unknown" if self.truncation is None else f"{self.truncation:.1e} of"
        adds = f"packing at rank {entry.rank} adds {error:.1e} to {cost} truncation error"
        if other is None:
            return replace(packed, note=f"{adds}; factored storage of these bytes has no rank")
        compared = f"factored storage of these bytes, rank {other.rank}, adds {other.error:.1e}"
        if other.error < error:
            return replace(other, note=f"stored factored: {adds}; {compared}")
        return replace(packed, note=f"stored packed: {adds}; {compared}")

    def _of_same_bytes(self, W: Tensor, bias: Tensor | None) -> Conversion | None:
        """The best factored layer of at most the planned bytes, None if none fits."""
        m, n = W.shape
        by_rank = bytes_by_rank(
            Shape(m, n, bias is not None),
            weights=self.entry.weights,
            dtype_bytes=self.dtype.itemsize,
        )
        fitting = np.flatnonzero(by_rank[1:] <= self.entry.bytes) + 1
        if not fitting.size:
            return None
        rank = int(fitting[-1])
        objective = "plain" if self.C is None else "whitened"
        best = decompose(objective, W, self.moments, name=self.entry.name, rank=rank)
        stored = self._factored(*best.cut(rank), bias)
        return Conversion(stored, "factored", rank, self._error(W, stored))

    def _error(self, W: Tensor, layer: Any) -> float:
        difference = layer.dense_weight().to(W) - W
        scale = _norm(W, self.C)
        return float(_norm(difference, self.C) / scale) if scale > 0 else 0.0


def _norm(E: Tensor, C: Tensor | None) -> Tensor:
    """Frobenius norm of `E`, or of `E X` with `C = Σ x xᵀ`."""
    return E.norm() if C is None else ((E @ C.to(E)) * E).sum().clamp_min(0.0).sqrt()
