"""What gated layers and the flat vector of scores do together in every training.

`Gated` binds each layer's slice of the gates before a forward pass, counts the bytes of what is
alive, and leaves dead components out of the products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from spectrim.allocate.curve import Curve
from spectrim.allocate.elastic import bytes_by_components
from spectrim.allocate.ladder import Limits
from spectrim.learn.gated import GatedLinear
from spectrim.learn.gates import GateFunction, Spans, gate_values, start_value
from spectrim.learn.lessons import mixed_seed


@dataclass
class Gated:
    """All gated layers of a model, in the order of their curves.

    Attributes:
        layers: target name -> layer.
        curves: names and shapes of the targets, in the same order.
        limits: how bytes are counted.
        adapters: LoRA components per target, counted in every factored target.
    """

    layers: Mapping[str, GatedLinear]
    curves: Sequence[Curve]
    limits: Limits
    adapters: int = 0
    spans: Spans = field(init=False)
    _tables: list[np.ndarray] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.spans = Spans(tuple(layer.components for layer in self.layers.values()))
        self._tables = bytes_by_components(self.curves, self.limits, adapters=self.adapters)

    @property
    def device(self) -> torch.device:
        """Where the layers are."""
        return next(iter(self.layers.values())).up.device

    @property
    def dense_bytes(self) -> int:
        """Bytes of all targets if they were dense."""
        return sum(int(table[-1]) for table in self._tables)

    def scores(self, function: GateFunction, *, scale: float, dtype: torch.dtype) -> nn.Parameter:
        """A fresh vector with every gate at exactly one, (N,)."""
        start = start_value(function, scale)
        return nn.Parameter(torch.full((self.spans.total,), start, dtype=dtype, device=self.device))

    def bind(self, gates: Tensor | None) -> None:
        """Give every layer its gates from a flat vector (N,); None opens them all."""
        parts = [None] * len(self.layers) if gates is None else self.spans.split(gates)
        for layer, part in zip(self.layers.values(), parts, strict=True):
            layer.gate = part

    def bind_scores(self, scores: Tensor, function: GateFunction, *, scale: float) -> None:
        """Gates from scores, with a fresh graph back to them."""
        self.bind(gate_values(scores, function, scale=scale))

    def draw_dropout(self, seed: int, step: int, turn: int) -> None:
        """Set the dropout of the corrections for one forward pass, the `turn`-th of a step."""
        for index, layer in enumerate(self.layers.values()):
            if layer.lora is not None and layer.lora.dropout > 0:
                layer.lora.noise = mixed_seed(seed, step, turn, index)

    def stop_dropout(self) -> None:
        """Corrections as they are used after training."""
        for layer in self.layers.values():
            if layer.lora is not None:
                layer.lora.noise = None

    def use(self, mask: Tensor | None) -> None:
        """Compute with the components of a boolean vector (N,) only; None for all."""
        if mask is None:
            for layer in self.layers.values():
                layer.use_only(None)
            return
        for layer, part in zip(self.layers.values(), self.spans.split(mask), strict=True):
            layer.use_only(part.nonzero().flatten())

    def kept_bytes(self, alive: Tensor) -> int:
        """Bytes of all targets with these components, boolean (N,); one host sync."""
        counts = self.spans.counts(alive).tolist()
        return sum(int(table[k]) for table, k in zip(self._tables, counts, strict=True))

    def kept(self, alive: Tensor) -> float:
        """The same as a fraction of the dense bytes."""
        return self.kept_bytes(alive) / self.dense_bytes

    def load(self, alive: Tensor) -> float:
        """Factored numbers of these components over dense numbers; above 1 at the start.

        Unlike `kept` it falls with every death, also above break-even.
        """
        costs = self.costs()
        counts = self.spans.counts(alive).tolist()
        dense = sum(c.shape.out_features * c.shape.in_features for c in self.curves)
        return sum(a * cost for a, cost in zip(counts, costs, strict=True)) / dense

    def costs(self) -> list[int]:
        """Numbers that one component of each target takes, m + n."""
        return [c.shape.out_features + c.shape.in_features for c in self.curves]

    def corrections(self) -> list[nn.Parameter]:
        """Parameters of all LoRA branches."""
        found = [layer.lora for layer in self.layers.values() if layer.lora is not None]
        return [p for lora in found for p in lora.parameters()]
