"""The honest line: what rounding every target alike would lose at the bytes of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from spectrim.allocate.budget import layer_bytes
from spectrim.allocate.curve import Curve, as_numpy
from spectrim.allocate.forms import Form
from spectrim.allocate.plan import Plan
from spectrim.formats import FORMATS

__all__ = ["YARDSTICKS", "Yardstick", "sentence", "yardstick"]

YARDSTICKS = tuple(Form("dense", f"int{bits}-g128") for bits in (8, 4, 3, 2))
"""Formats in which whole models are commonly rounded; surveys judge them whatever is asked for."""


@dataclass(frozen=True)
class Yardstick:
    """Every target rounded to one format, none cut.

    Attributes:
        weights: the format, the largest that takes no more bytes than the plan.
        keep: what it takes.
        loss: predicted, nats per token.
    """

    weights: str
    keep: float
    loss: float


def yardstick(curves: Sequence[Curve], plan: Plan, dtype_bytes: int) -> Yardstick | None:
    """The best uniform rounding of at most the plan's bytes; None if nothing fits or is known."""
    stored, dense = sum(e.bytes for e in plan.entries), sum(e.dense_bytes for e in plan.entries)
    keys = set.intersection(*(set(curve.rounding or {}) for curve in curves)) if curves else set()
    found = []
    for weights in FORMATS:
        key = Form("dense", weights).key
        if key not in keys:
            continue
        size = sum(
            layer_bytes(
                curve.shape, rank=None, storage="dense", weights=weights, dtype_bytes=dtype_bytes
            )
            for curve in curves
        )
        loss = sum(float(as_numpy((curve.rounding or {})[key])[0]) for curve in curves)
        if size <= stored:
            found.append(Yardstick(weights, size / dense, loss))
    return min(found, key=lambda one: one.loss, default=None)


def sentence(found: Yardstick | None) -> str:
    """For the notes of a report."""
    if found is None:
        return "plain GPTQ has no format of at most these bytes (int2 at groups of 128 is larger)"
    return (
        f"plain GPTQ at these bytes: every target in {found.weights} takes keep {found.keep:.4f} "
        f"and would lose {found.loss:.2g} nats per token (predicted)"
    )
