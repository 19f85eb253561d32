"""Tables of the studies along depth and over calibration text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spectrim.cli.render import print_facts, print_note, print_table


def print_calibration(record: Mapping[str, Any], output: Path) -> None:
    """Print perplexities, numbers of windows down and recipes across."""
    points = record["points"]
    recipes = list(dict.fromkeys(point["recipe"] for point in points))
    counts = list(dict.fromkeys(point["windows"] for point in points))
    rows = []
    for count in counts:
        cells = [
            [p["perplexity"] for p in points if (p["recipe"], p["windows"]) == (recipe, count)]
            for recipe in recipes
        ]
        rows.append((str(count), *(_spread(values) for values in cells)))
    title = f"perplexity at keep {record['keep']:g}, by calibration windows"
    print_table(("windows", *recipes), rows, title=title)
    if len({point["seed"] for point in points}) > 1:
        print_note("mean over seeds, and from the least to the largest")
    print_facts(
        {
            "dense": f"perplexity {record['dense']['perplexity']:.3f}",
            "tokens per window": record["window_length"],
            **{f"skipped {name}": why for name, why in record["skipped"].items()},
            "output": output,
        }
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    words = f"{statistics.fmean(values):.3f}"
    return words if len(values) == 1 else f"{words} [{min(values):.3f}, {max(values):.3f}]"


def print_depth(found: Sequence[Any], output: Path) -> None:
    """Print the distortion of every block's output."""
    print_table(
        ("model", "block", "squared error", "relative error", "cosine distance"),
        [
            (
                one.model,
                str(one.block),
                f"{one.mse:.4g}",
                f"{one.relative:.4g}",
                f"{one.cosine:.4g}",
            )
            for one in found
            if one.projection == "block"
        ],
    )
    print_facts({"output": output})


def print_layer_errors(found: Sequence[Any], output: Path) -> None:
    """Print the median over blocks of every projection's errors, results across."""
    models = list(dict.fromkeys(one.model for one in found))
    projections = list(dict.fromkeys(one.projection for one in found))
    rows = []
    for projection in projections:
        cells = []
        for model in models:
            mine = [e for e in found if (e.model, e.projection) == (model, projection)]
            told = [e.predicted for e in mine if e.predicted is not None]
            promise = f"{statistics.median(told):.3g}" if told else "-"
            cells.append(f"{promise} -> {statistics.median([e.held_out for e in mine]):.3g}")
        rows.append((projection, *cells))
    title = "relative squared error, predicted -> on held-out text, median over blocks"
    print_table(("projection", *models), rows, title=title)
    print_facts({"output": output})
