"""What commands that make a plan or a smaller model say about it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectrim.cli.render import format_bytes, print_facts, print_table, storage_words

if TYPE_CHECKING:
    from spectrim.allocate.plan import Plan, PlanEntry

__all__ = ["print_heat_map", "print_plan_summary", "print_ranks"]


def print_plan_summary(
    plan: Plan, *, recipe: str | None = None, output: Path | None = None
) -> None:
    """Print what was asked for, what was reached, and where the result lies."""
    dense = sum(entry.dense_bytes for entry in plan.entries)
    stored = sum(entry.bytes for entry in plan.entries)
    whole = sum(1 for entry in plan.entries if entry.rank is None)
    loss = plan.predicted_loss
    print_facts(
        {
            "recipe": recipe,
            "rule": plan.rule,
            "keep": f"{plan.achieved_keep:.4f} (asked for {plan.keep:.4g})",
            "target bytes": f"{format_bytes(stored)} of {format_bytes(dense)}",
            "targets": f"{len(plan.entries)}, {whole} left dense",
            "predicted loss": None if loss is None else f"{loss:.4g}",
            "notes": "; ".join(plan.notes) or None,
            "output": output,
        }
    )


def print_ranks(plan: Plan) -> None:
    """Print rank, storage, bytes and predicted loss of every target."""
    print_table(
        ("target", "rank", "storage", "bytes", "kept", "predicted loss"),
        [
            (
                entry.name,
                "-" if entry.rank is None else str(entry.rank),
                storage_words(entry.storage, entry.weights),
                format_bytes(entry.bytes),
                f"{entry.kept:.1%}",
                "-" if entry.loss is None else f"{entry.loss:.3g}",
            )
            for entry in plan.entries
        ],
        title="ranks",
    )


def print_heat_map(plan: Plan) -> None:
    """Print the kept fraction of each target, blocks down and projections across."""
    from rich.text import Text

    cells: dict[str, dict[str, PlanEntry]] = {}
    projections: dict[str, None] = {}
    for entry in plan.entries:
        block, projection = split_name(entry.name)
        cells.setdefault(block, {})[projection] = entry
        projections[projection] = None
    rows: list[Sequence[str | Text]] = []
    for block, entries in cells.items():
        row: list[str | Text] = [block]
        for projection in projections:
            entry = entries.get(projection)
            row.append("-" if entry is None else Text(f"{entry.kept:.0%}", style=shade(entry.kept)))
        rows.append(row)
    print_table(("block", *projections), rows, title="kept bytes")


def split_name(name: str) -> tuple[str, str]:
    """`model.layers.3.self_attn.q_proj` -> (`3`, `self_attn.q_proj`).

    The first number names the block; later ones count experts inside it.
    """
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part.isdigit():
            return part, ".".join(parts[position + 1 :])
    return "-", name


def shade(kept: float) -> str:
    """A color for a terminal: the more is cut, the warmer."""
    for bound, color in ((0.25, "red"), (0.5, "yellow"), (0.75, "green"), (1.0, "cyan")):
        if kept < bound:
            return color
    return "blue"
