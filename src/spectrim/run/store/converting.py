"""One finished target into the form in which it is stored, and what that rounds away.

The layer arrives factored (or dense) in the working precision. Errors are relative to what it
computes there, `‖E X‖ / ‖W X‖` on the moments' inputs or in Frobenius norms without moments.

What a kind stores, and how it rounds one part after the other, is its layer class's `stored`.

A packed layer that rounds more than `PACKED_ERROR_SHARE` of what the cut cost is compared with the
factored layer of the same bytes, which has a smaller rank; the better of the two is stored. There
the moments get one token of the prior for every channel: few tokens alone say that a smaller rank
costs nothing, because the cut was fitted to them, and all other tokens would pay for it.
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
from spectrim.layers.layout import layout_of
from spectrim.layers.quantized import wide_weight
from spectrim.layers.source import Source
from spectrim.linalg.psd import shrunk
from spectrim.model.weights import read_bias, read_weight
from spectrim.moments.moments import Moments
from spectrim.tolerances import PACKED_ERROR_SHARE


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
        G: what errors of its outputs cost, (out, out), where a residual is found in it.
    """

    entry: PlanEntry
    dtype: torch.dtype
    moments: Moments | None = None
    truncation: float | None = None
    G: Tensor | None = None

    @property
    def C(self) -> Tensor | None:
        """Second moment of the inputs, (in, in)."""
        return None if self.moments is None else self.moments.C

    def convert(self, layer: Any) -> Conversion:
        """The stored form of a layer: a dense one, or a `LowRankLinear` of the planned rank.

        Raises:
            NumericalError: a matrix cannot be packed or solved for; names the target.
        """
        source = self._source(layer)
        found = self._stored(source, self.entry.storage, self.entry.rank)
        return self._or_factored(source, found) if found.storage == "packed" else found

    def _source(self, layer: Any) -> Source:
        name, C = self.entry.name, self.C
        if self.entry.components is None:
            W = read_weight(layer).detach().double()
            return Source(name, W, read_bias(layer), C=C, G=self.G)
        up, down = wide_weight(layer.up).double(), wide_weight(layer.down).double()
        return Source(name, up @ down, layer.bias, (up, down), C)

    def _stored(self, source: Source, storage: Storage, rank: int | None) -> Conversion:
        kind = layout_of(storage).layer_class()
        layer = kind.stored(source, rank, self.entry.weights, dtype=self.dtype)
        return Conversion(layer, storage, rank, source.relative_error(layer.dense_weight()))

    def _or_factored(self, source: Source, packed: Conversion) -> Conversion:
        """The packed layer, or the factored one of its bytes where that rounds less."""
        entry = self.entry
        if self.truncation is not None and packed.error <= PACKED_ERROR_SHARE * self.truncation:
            return packed
        source = replace(source, C=self._with_prior(source))
        error = source.relative_error(packed.layer.dense_weight())
        other = self._of_same_bytes(source)
        cost = "an unknown" if self.truncation is None else f"{self.truncation:.1e} of"
        adds = f"packing at rank {entry.rank} adds {error:.1e} to {cost} truncation error"
        if other is None:
            return replace(packed, note=f"{adds}; factored storage of these bytes has no rank")
        compared = f"factored storage of these bytes, rank {other.rank}, adds {other.error:.1e}"
        if other.error < error:
            return replace(other, note=f"stored factored: {adds}; {compared}")
        return replace(packed, note=f"stored packed: {adds}; {compared}")

    def _with_prior(self, source: Source) -> Tensor | None:
        """Second moment of the inputs, (in, in), as if one token more had come for each channel."""
        if self.moments is None or source.C is None:
            return None
        channels = len(source.C)
        share = channels / (channels + self.moments.tokens)
        return shrunk(source.C.double(), share, source.W.square().sum(0))

    def _of_same_bytes(self, source: Source) -> Conversion | None:
        """The best factored layer of at most the planned bytes, None if none fits."""
        m, n = source.W.shape
        by_rank = bytes_by_rank(
            Shape(m, n, source.bias is not None),
            weights=self.entry.weights,
            dtype_bytes=self.dtype.itemsize,
        )
        fitting = np.flatnonzero(by_rank[1:] <= self.entry.bytes) + 1
        if not fitting.size:
            return None
        rank = int(fitting[-1])
        moments = None if source.C is None else Moments(1, source.C)
        objective = "plain" if moments is None else "whitened"
        best = decompose(objective, source.W, moments, name=self.entry.name, rank=rank)
        return self._stored(replace(source, factors=best.cut(rank)), "factored", rank)
