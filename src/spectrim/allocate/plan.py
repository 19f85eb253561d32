"""The result of allocation: how every target will be stored, and what that is predicted to cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from spectrim.layers.layout import layout_of

Storage: TypeAlias = str
"""A storage kind of `layers.layout`."""

Weights: TypeAlias = str
"""A number format of `spectrim.formats`, or several joined by `+`, one for each part."""


@dataclass(frozen=True)
class PlanEntry:
    """One target of a plan.

    Attributes:
        name: the target's module path.
        rank: number of components kept, None where the original weight stays dense; of a residual,
            those of its correction.
        storage: how the kept matrix is stored.
        weights: number formats of its parts; `native` is the model's dtype.
        bytes: stored bytes of the layer, bias included.
        dense_bytes: bytes of the original layer, bias included.
        loss: predicted increase of the rule's objective, None where the rule predicts nothing.
    """

    name: str
    rank: int | None
    storage: Storage
    bytes: int
    dense_bytes: int
    weights: Weights = "native"
    loss: float | None = None

    @property
    def kept(self) -> float:
        """Stored bytes of this target over its dense bytes."""
        return self.bytes / self.dense_bytes

    @property
    def components(self) -> int | None:
        """How many components of the original matrix are kept, None where it is not cut."""
        return None if layout_of(self.storage).whole else self.rank

    @property
    def corrected(self) -> bool:
        """Whether it is stored whole, with a correction of a small rank beside it."""
        return self.rank is not None and self.components is None

    @property
    def converts(self) -> bool:
        """Whether the finished target takes another form to be stored in."""
        return self.storage not in ("dense", "factored") or self.weights != "native"


@dataclass(frozen=True)
class Plan:
    """Ranks and storage for every target, in execution order.

    Attributes:
        entries: one per target.
        keep: the fraction of target bytes that was asked for.
        rule: name of the allocation rule.
        notes: what a reader of the report should know (floors that bound, reverted targets).
        unit: of the predicted losses; None where it is not known.
    """

    entries: tuple[PlanEntry, ...]
    keep: float
    rule: str
    notes: tuple[str, ...] = field(default=())
    unit: str | None = field(default=None, compare=False)

    @property
    def achieved_keep(self) -> float:
        """Stored over dense bytes of all targets."""
        return sum(e.bytes for e in self.entries) / sum(e.dense_bytes for e in self.entries)

    @property
    def predicted_loss(self) -> float | None:
        """Sum of the entries' predicted losses, None where the rule predicts nothing."""
        losses = [e.loss for e in self.entries]
        return None if any(v is None for v in losses) else sum(v for v in losses if v is not None)

    @property
    def cuts(self) -> Plan:
        """The plan as far as it cuts: what is stored whole has no rank."""
        return replace(self, entries=tuple(replace(e, rank=e.components) for e in self.entries))

    def __getitem__(self, name: str) -> PlanEntry:
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)
