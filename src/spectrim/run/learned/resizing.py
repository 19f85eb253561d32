"""Another size from an artifact as an ordinary outcome of a run, without data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe
from spectrim.run.compress import Outcome
from spectrim.run.job import RunLog
from spectrim.run.learned.elastic import ElasticModel
from spectrim.run.reporting import build_report
from spectrim.run.store.storing import cast_parameters
from spectrim.storage.folder import RECIPE_FILE, REPORT_FILE
from spectrim.storage.json_file import read_json

__all__ = ["settle_outcome"]


def settle_outcome(
    opened: ElasticModel, artifact: str | Path, *, keep: float | None, size: int | str | None
) -> Outcome:
    """Cut an opened artifact to one size for good.

    Raises:
        BudgetError: below the smallest size; names it.
    """
    log = RunLog()
    with log.timed("resize"):
        plan = opened.resize(keep, size=size, repair=True)
        model = opened.settle()
        cast_parameters(model, opened.elastic.dtype)
    recipe, calibration = _origin(Path(artifact))
    recipe = recipe.with_changes(keep=plan.keep)
    order = opened.elastic.order
    log.notes.append(f"cut from {Path(artifact).name} without data")
    report = build_report(
        model_name=opened.elastic.base.name,
        recipe=recipe,
        plan=plan,
        windows=None,
        log=log,
        shapes={c.name: (c.shape.out_features, c.shape.in_features) for c in order.curves},
        other_bytes=opened.elastic.base.other_bytes,
        left_alone={},
    )
    report["calibration"] = calibration
    return Outcome(model, opened.tokenizer, plan, recipe, report)


def _origin(folder: Path) -> tuple[Recipe, Any]:
    """The recipe behind an artifact, and what it was calibrated on."""
    report = read_json(folder / REPORT_FILE)
    return get_recipe(folder / RECIPE_FILE), report.get("calibration")
