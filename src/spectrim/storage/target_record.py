"""What every record on disk says of a target: which it is, and its shape."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from pydantic import Field

from spectrim.allocate.budget import Shape
from spectrim.allocate.curve import Curve
from spectrim.storage.strict import MOST_TARGETS, Name, Side, Strict

OneTarget = TypeVar("OneTarget", bound="TargetRecord")


class TargetRecord(Strict):
    """Which target it is, and its shape; a file adds what it knows beyond."""

    name: Name
    block: Annotated[int, Field(ge=0, lt=MOST_TARGETS)]
    projection: Name
    out_features: Side
    in_features: Side
    bias: bool

    @classmethod
    def of(cls: type[OneTarget], curve: Curve, **more: Any) -> OneTarget:
        """A curve's target, with what the file adds."""
        where = {"name": curve.name, "block": curve.block, "projection": curve.projection}
        return cls(**where, **asdict(curve.shape), **more)

    def curve(self, **known: Any) -> Curve:
        """The target's curve, with what is known of it."""
        shape = Shape(self.out_features, self.in_features, self.bias)
        return Curve(self.name, self.block, self.projection, shape, **known)
