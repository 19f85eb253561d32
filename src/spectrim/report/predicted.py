"""How a predicted loss is said: with its unit, and with how far it is off or may be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from spectrim.allocate.rules import NATS

OFF = "such predictions were off by factors from 0.6 to 8 where they were measured"
"""docs/evaluation.md has the measurements."""


def loss_words(
    loss: float | None, unit: str | None, measured: Sequence[Mapping[str, Any]] = ()
) -> str | None:
    """A predicted loss with its unit and, next to it, what was measured or how far it may be off.

    Args:
        loss: sum over targets; None where the rule predicts nothing.
        unit: of it.
        measured: texts of a report's `measured`.
    """
    if loss is None:
        return None
    if unit != NATS:
        return f"{loss:.3g} ({unit or 'of the rule'}; no loss of the model)"
    found = next((m for m in measured if m.get("difference")), None)
    if found is None:
        return f"{loss:.3g} {unit} ({OFF})"
    difference = found["difference"]
    words = f"{loss:.3g} {unit}; measured {difference['nll']:+.3g} ± "
    words += f"{difference['nll_standard_error']:.1g} on {found['text']}"
    if loss > 0 and difference["nll"] > 0:
        words += f", {difference['nll'] / loss:.2g} times as much"
    return words
