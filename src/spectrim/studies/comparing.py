"""Recipes side by side at equal sizes, with the files of the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.api import resolve_recipe
from spectrim.errors import InputError
from spectrim.evaluate.curve import parse_keeps
from spectrim.measure.compare import Comparison, compare_recipes
from spectrim.recipe import Recipe
from spectrim.report.content import as_json
from spectrim.report.tables import comparison_csv, comparison_markdown
from spectrim.run.sources import sources_of
from spectrim.run.texts import own_text
from spectrim.studies.files import open_study, write_text
from spectrim.studies.measure import Measure, different_names, measured_on

__all__ = ["compare"]


def compare(
    model: str | Path,
    *,
    recipes: Sequence[str | Path | Recipe],
    keep: str | Sequence[float] = (0.8, 0.6, 0.4),
    measure: Measure | None = None,
    output: str | Path | None = None,
    **calibration: Any,
) -> Comparison:
    """Recipes side by side at equal sizes, each run in a process of its own.

    Args:
        model: a hub name or a folder.
        recipes: to compare.
        keep: sizes.
        measure: evaluation text and its protocol.
        output: folder for `compare.md`, `.csv`, `.json` and the finished runs.
        **calibration: `text` (names or files), `windows`, `window_length`, `seed`, `storage`,
            `weights` as in `spectrim.compress`.

    Raises:
        SpectrimError: unknown recipes, texts or models; every run failed.
    """
    if isinstance(model, nn.Module):
        raise InputError("compare runs each recipe in its own process; give a folder or hub name")
    if not recipes:
        raise InputError("compare needs recipes, for example svd-llm,aa-svd")
    if own_text(calibration.get("text")) is not None:
        raise InputError("compare runs in other processes; give the text as names or files")
    measure = measured_on(measure, calibration.get("text"))
    keeps = parse_keeps(keep) if isinstance(keep, str) else list(keep)
    resolved = different_names([resolve_recipe(r, **calibration) for r in recipes])
    folder, store = open_study(
        output,
        writes=[f"compare.{kind}" for kind in ("json", "csv", "md")],
        sources=sources_of(model=model, text=[calibration.get("text"), measure.text]),
    )
    options = ["--device", str(measure.options.device)]
    options += ["--trust-remote-code"] if measure.options.trust_remote_code else []
    found = compare_recipes(
        measure.reference(model),
        resolved,
        keeps,
        options=options,
        store=store,
    )
    if folder is not None:
        record = found.record()
        write_text(folder / "compare.json", as_json(record))
        write_text(folder / "compare.csv", comparison_csv(record))
        write_text(folder / "compare.md", comparison_markdown(record))
    return found
