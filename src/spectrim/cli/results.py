"""Results of measuring and compressing as tables for people; `--json` gives programs the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectrim.cli.progress import format_seconds
from spectrim.cli.render import (
    format_bytes,
    format_count,
    print_facts,
    print_table,
    storage_words,
)

__all__ = ["print_compression", "print_inspection"]


def print_compression(report: dict[str, Any], output: Path) -> None:
    """Print what was asked for and reached, what it cost, and where the result lies.

    Args:
        report: as in `spectrim_report.json`.
        output: the folder written.
    """
    keep = report["keep"]
    targets = report["targets"]
    dense = sum(1 for target in targets if target["rank"] is None)
    loss = report["predicted_loss"]
    print_facts(
        {
            "recipe": report["recipe"]["name"],
            "keep": f"{keep['achieved']:.4f} of the target bytes (asked for {keep['asked']:.4g})",
            "targets": f"{of(keep['target_bytes'])}; {len(targets)}, {dense} left dense",
            "whole model": f"{of(keep['model_bytes'])}, {keep['whole_model']:.1%}",
            "predicted loss": None if loss is None else f"{loss:.4g} ({report['rule']})",
            "time": format_seconds(sum(report["seconds"].values())),
            "peak memory": format_bytes(report["peak_memory_bytes"]),
            "left alone": f"{len(report['left_alone'])} modules" if report["left_alone"] else None,
            "notes": "; ".join(report["notes"]) or None,
            "output": output,
        }
    )


def print_inspection(record: dict[str, Any]) -> None:
    """Print every target of a folder and its totals, as counted from the files."""
    targets = record["targets"]
    if targets:
        print_table(
            ("target", "storage", "dtype", "shape", "rank", "bytes", "kept"),
            [
                (
                    target["name"],
                    storage_words(target["storage"], target["weights"]),
                    target["dtype"],
                    f"{target['out_features']}x{target['in_features']}",
                    "-" if target["rank"] is None else str(target["rank"]),
                    format_bytes(target["bytes"]),
                    f"{target['kept']:.1%}",
                )
                for target in targets
            ],
            words=3,
        )
    keep = record["achieved_keep"]
    pair = {"stored": record["bytes"], "dense": record["dense_bytes"]}
    target_pair = {"stored": record["target_bytes"], "dense": record["dense_target_bytes"]}
    print_facts(
        {
            "folder": record["folder"],
            "keep": "an ordinary model, not compressed" if keep is None else f"{keep:.4f}",
            "targets": of(target_pair) if targets else None,
            "whole model": of(pair) if targets else format_bytes(record["bytes"]),
            "parameters": format_count(record["parameters"]),
            "files": ", ".join(f"{n} {format_bytes(b)}" for n, b in record["files"].items()),
        }
    )


def of(pair: dict[str, int]) -> str:
    """Stored bytes of dense bytes."""
    return f"{format_bytes(pair['stored'])} of {format_bytes(pair['dense'])}"
