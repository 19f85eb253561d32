"""Targets as tables that fit 80 columns: by projection, along depth, or every one of them."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spectrim.cli.render import print_table, storage_words
from spectrim.sizes import format_bytes

if TYPE_CHECKING:
    from rich.text import Text

    from spectrim.allocate.plan import Plan

MOST_BANDS = 16
"""Rows of the map along depth; deeper models share a row among neighboring blocks."""


@dataclass(frozen=True)
class TargetRow:
    """One target as tables show it; shape and loss only where they are known."""

    name: str
    rank: int | None
    storage: str
    bytes: int
    dense_bytes: int
    loss: float | None = None
    shape: str | None = None

    @classmethod
    def from_record(cls, target: Mapping[str, Any]) -> TargetRow:
        """From what `spectrim inspect --json` says of a target."""
        return cls(
            target["name"],
            target["rank"],
            storage_words(target["storage"], target["weights"]),
            target["bytes"],
            target["dense_bytes"],
            shape=f"{target['out_features']}x{target['in_features']}",
        )


def rows_of_plan(plan: Plan) -> list[TargetRow]:
    """The entries of a plan."""
    return [
        TargetRow(
            e.name, e.rank, storage_words(e.storage, e.weights), e.bytes, e.dense_bytes, e.loss
        )
        for e in plan.entries
    ]


def print_targets(rows: Sequence[TargetRow]) -> None:
    """Print every target; what all names begin with is said once, above the table."""
    root = common_root([row.name for row in rows])
    columns = {
        "target": [row.name.removeprefix(f"{root}.") for row in rows],
        "storage": [row.storage for row in rows],
        "shape": [row.shape for row in rows],
        "rank": ["-" if row.rank is None else str(row.rank) for row in rows],
        "bytes": [format_bytes(row.bytes) for row in rows],
        "kept": [f"{row.bytes / row.dense_bytes:.1%}" for row in rows],
        "loss": [None if row.loss is None else f"{row.loss:.3g}" for row in rows],
    }
    shown = {name: cells for name, cells in columns.items() if any(c is not None for c in cells)}
    print_table(
        tuple(shown),
        [[cell or "-" for cell in row] for row in zip(*shown.values(), strict=True)],
        title=f"targets of {root}" if root else "targets",
        words=2,
    )


def print_projections(rows: Sequence[TargetRow]) -> None:
    """Print one line per kind of target: how many, their ranks, what they keep and lose."""
    loss = ("loss",) if all(row.loss is not None for row in rows) else ()
    kinds: dict[str, list[TargetRow]] = {}
    for row in rows:
        kinds.setdefault(kind_of(row.name), []).append(row)
    print_table(
        ("projection", "count", "dense", "ranks (median)", "bytes", "kept", *loss),
        [
            (
                kind,
                str(len(mine)),
                str(sum(1 for row in mine if row.rank is None)),
                span([row.rank for row in mine if row.rank is not None]),
                format_bytes(sum(row.bytes for row in mine)),
                f"{kept(mine):.1%}",
                *([f"{sum(row.loss or 0.0 for row in mine):.3g}"] if loss else []),
            )
            for kind, mine in kinds.items()
        ],
        title="targets by projection",
    )


def print_heat_map(rows: Sequence[TargetRow]) -> None:
    """Print the kept fraction along depth, blocks (or bands of them) down, projections across."""
    from rich.text import Text

    blocks = list(dict.fromkeys(split_name(row.name)[0] for row in rows))
    kinds = list(dict.fromkeys(kind_of(row.name) for row in rows))
    step = -(-len(blocks) // MOST_BANDS)
    lines: list[Sequence[str | Text]] = []
    for start in range(0, len(blocks), step):
        band = blocks[start : start + step]
        line: list[str | Text] = [band[0] if len(band) == 1 else f"{band[0]}-{band[-1]}"]
        for kind in kinds:
            mine = [r for r in rows if split_name(r.name)[0] in band and kind_of(r.name) == kind]
            share = kept(mine) if mine else None
            line.append("-" if share is None else Text(f"{share:.0%}", style=shade(share)))
        lines.append(line)
    print_table(("block", *short_names(kinds)), lines, title="kept bytes along depth")


def split_name(name: str) -> tuple[str, str]:
    """`model.layers.3.self_attn.q_proj` -> (`3`, `self_attn.q_proj`).

    The first number names the block; later ones count experts inside it.
    """
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part.isdigit():
            return part, ".".join(parts[position + 1 :])
    return "-", name


def kind_of(name: str) -> str:
    """The path inside the block with one name for all experts: `mlp.experts.*.w2`."""
    return ".".join("*" if part.isdigit() else part for part in split_name(name)[1].split("."))


def short_names(kinds: Sequence[str]) -> list[str]:
    """The last parts of the paths, as few as tell them apart."""
    for parts in (1, 2):
        short = [".".join(kind.split(".")[-parts:]) for kind in kinds]
        if len(set(short)) == len(kinds):
            return short
    return list(kinds)


def common_root(names: Sequence[str]) -> str:
    """The module path that all names lie in: `model.layers`; empty if there is none."""
    paths = [name.split(".")[:-1] for name in names]
    levels = zip(*paths, strict=False)  # as deep as the shortest
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, levels)
    return ".".join(parts[0] for parts in shared)


def span(ranks: Sequence[int]) -> str:
    """`12-80 (40)`: least, largest and median; a dash where nothing was cut."""
    if not ranks:
        return "-"
    if min(ranks) == max(ranks):
        return str(ranks[0])
    return f"{min(ranks)}-{max(ranks)} ({statistics.median_low(ranks)})"


def kept(rows: Sequence[TargetRow]) -> float:
    """Stored over dense bytes of some targets."""
    return sum(row.bytes for row in rows) / sum(row.dense_bytes for row in rows)


def shade(kept: float) -> str:
    """A color for a terminal: the more is cut, the warmer."""
    for bound, color in ((0.25, "red"), (0.5, "yellow"), (0.75, "green"), (1.0, "cyan")):
        if kept < bound:
            return color
    return "blue"
