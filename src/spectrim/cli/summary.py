"""What commands that make a plan or a smaller model say about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.cli.render import print_facts
from spectrim.sizes import format_bytes

if TYPE_CHECKING:
    from spectrim.allocate.plan import Plan

NATS = "nats per token"

OFF = "such predictions were off by factors from 0.8 to 8 where they were measured"
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


def print_plan_summary(
    plan: Plan, *, recipe: str | None = None, output: Path | None = None
) -> None:
    """Print what was asked for, what was reached, and where the result lies."""
    dense = sum(entry.dense_bytes for entry in plan.entries)
    stored = sum(entry.bytes for entry in plan.entries)
    whole = sum(1 for entry in plan.entries if entry.rank is None)
    print_facts(
        {
            "recipe": recipe,
            "rule": plan.rule,
            "keep": f"{plan.achieved_keep:.4f} (asked for {plan.keep:.4g})",
            "target bytes": f"{format_bytes(stored)} of {format_bytes(dense)}",
            "targets": f"{len(plan.entries)}, {whole} left dense",
            "predicted loss": loss_words(plan.predicted_loss, plan.unit),
            "notes": "; ".join(plan.notes) or None,
            "output": output,
        }
    )
