"""A comparison as Markdown and CSV; numbers as they are read, the best of each size in bold."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from spectrim.allocate.budget import format_bytes

COMPARISON_HEADERS = (
    "recipe",
    "keep",
    "bytes",
    "perplexity",
    "nats above dense",
    "KL to dense",
    "same top",
    "seconds",
    "peak memory",
    "",
)


def comparison_rows(entries: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Cells of every entry; the last says whether it is the best or within its noise.

    Args:
        entries: records as `spectrim compare` writes them.
    """
    return [
        (
            str(e["recipe"]),
            f"{e['achieved']:.3f}",
            format_bytes(e["model_bytes"]),
            f"{e['perplexity']:.3f}" if e["perplexity"] < 1000 else f"{e['perplexity']:.4g}",
            _interval(e),
            f"{e['kl']:.4f}",
            f"{e['top1']:.1%}",
            f"{e['seconds']:.1f}",
            "–" if e["peak_bytes"] is None else format_bytes(e["peak_bytes"]),
            _standing(e),
        )
        for e in entries
    ]


def _interval(entry: Mapping[str, Any]) -> str:
    if entry["excess_low"] is None:
        return f"{entry['excess']:+.4f}"
    return f"{entry['excess']:+.4f} [{entry['excess_low']:+.4f}, {entry['excess_high']:+.4f}]"


def _standing(entry: Mapping[str, Any]) -> str:
    if entry["best"]:
        return "best"
    if entry["within_noise"] is None:
        return "too few windows to say"
    return "within noise of best" if entry["within_noise"] else ""


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """The table in Markdown with its protocol; pipes in names are escaped."""
    dense = comparison["dense"]
    protocol = dense["protocol"]
    lines = [
        f"Dense {_cell(dense['model'])}: perplexity {dense['perplexity']:.3f} on "
        f"{', '.join(_cell(s) for s in protocol['sources'])}, {protocol['windows']} windows of "
        f"{protocol['window_length']} tokens, {protocol['dtype']}. Intervals are 95 %, from a "
        "paired bootstrap over windows.",
        "",
        "| " + " | ".join(COMPARISON_HEADERS) + " |",
        "|---|" + "---:|" * (len(COMPARISON_HEADERS) - 2) + "---|",
    ]
    for entry, row in zip(
        comparison["entries"], comparison_rows(comparison["entries"]), strict=True
    ):
        cells = [_cell(cell) for cell in row]
        if entry["best"]:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        f"\nFailed: {_cell(name)}: {_cell(why)}" for name, why in comparison["failed"].items()
    ]
    return "\n".join(lines) + "\n"


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


def comparison_csv(comparison: Mapping[str, Any]) -> str:
    """Every entry with all its values; unknown ones are empty."""
    return rows_csv(comparison["entries"])


def rows_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as CSV with a header; unknown values are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
