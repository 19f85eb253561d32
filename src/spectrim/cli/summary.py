"""What commands that make a plan or a smaller model say about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from spectrim.cli.render import print_facts
from spectrim.report.predicted import loss_words
from spectrim.sizes import format_bytes

if TYPE_CHECKING:
    from spectrim.allocate.plan import Plan


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
            "notes": list(plan.notes),
            "output": output,
        }
    )
