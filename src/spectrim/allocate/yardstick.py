"""The honest line: what rounding every target alike would lose at the bytes of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from spectrim.allocate.budget import layer_bytes
from spectrim.allocate.curve import Curve, as_numpy
from spectrim.allocate.forms import AUTO, RESIDUAL, Form
from spectrim.allocate.ladder import Limits
from spectrim.allocate.plan import Plan
from spectrim.formats import FORMATS

YARDSTICKS = tuple(Form("dense", f"int{bits}-g128") for bits in (8, 4, 3, 2))
"""Formats in which whole models are commonly rounded, the largest first; surveys judge them
whatever is asked for."""


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
        size = _rounded_bytes(curves, weights, dtype_bytes)
        loss = sum(float(as_numpy((curve.rounding or {})[key])[0]) for curve in curves)
        if size <= stored:
            found.append(Yardstick(weights, size / dense, loss))
    return min(found, key=lambda one: one.loss, default=None)


def yardsticks_for(curves: Sequence[Curve], keep: float, dtype_bytes: int) -> tuple[Form, ...]:
    """The one yardstick that a plan of this keep is held against, none if all are larger.

    Rounding every matrix once more is most of a survey's work, so what is surveyed for a single
    size does it once.
    """
    dense = _rounded_bytes(curves, "native", dtype_bytes)
    sizes = {form: _rounded_bytes(curves, form.weights, dtype_bytes) for form in YARDSTICKS}
    fitting = [form for form, size in sizes.items() if size <= keep * dense]
    return tuple(fitting[:1])


def _rounded_bytes(curves: Sequence[Curve], weights: str, dtype_bytes: int) -> int:
    """Of all targets, none cut."""
    options: dict[str, Any] = {"storage": "dense", "weights": weights, "dtype_bytes": dtype_bytes}
    return sum(layer_bytes(curve.shape, rank=None, **options) for curve in curves)


def sentence(found: Yardstick | None, plan: Plan) -> str:
    """For the notes of a report, beside what is predicted for the plan itself."""
    if found is None:
        return "plain GPTQ has no format of at most these bytes (int2 at groups of 128 is larger)"
    return (
        f"plain GPTQ at these bytes: every target in {found.weights} takes keep {found.keep:.4f} "
        f"and would lose {found.loss:.2g} nats per token, this plan {plan.predicted_loss or 0:.2g} "
        "(both predicted)"
    )


def judged_forms(
    limits: Limits, curves: Sequence[Curve], keep: float | None = None
) -> tuple[Form, ...]:
    """The forms whose rounding a survey measures: what a plan may choose, and yardsticks.

    Args:
        limits: of the plans to come.
        curves: the targets' shapes.
        keep: where it is the only one, None for plans of any size.
    """
    if limits.weights == AUTO or limits.storage == RESIDUAL:
        return (*limits.forms, *limits.whole)
    # Of cut matrices a survey for one size has no components to round.
    own = [form for form in limits.whole if form.coded and not form.low_rank]
    line = YARDSTICKS if keep is None else yardsticks_for(curves, keep, limits.dtype_bytes)
    return tuple(dict.fromkeys((*own, *line)))
