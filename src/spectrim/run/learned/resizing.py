"""Another size from an artifact as an ordinary outcome of a run, without data."""

from __future__ import annotations

from pathlib import Path

from spectrim.model.weights import cast_parameters
from spectrim.recipes import get_recipe
from spectrim.report.record import LeftAlone
from spectrim.run.compress import Outcome
from spectrim.run.job import RunLog
from spectrim.run.learned.elastic import ElasticModel
from spectrim.run.reporting import Original, build_report
from spectrim.storage.folder import RECIPE_FILE, REPORT_FILE
from spectrim.storage.json_file import read_json
from spectrim.storage.strict import checked


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
    folder = Path(artifact)
    recipe = get_recipe(folder / RECIPE_FILE).with_changes(keep=plan.keep)
    origin = read_json(folder / REPORT_FILE)
    found = checked(LeftAlone, origin, source=folder / REPORT_FILE)
    order = opened.elastic.order
    log.notes.append(f"cut from {folder.name} without data")
    original = Original(
        opened.elastic.base.name,
        {c.name: (c.shape.out_features, c.shape.in_features) for c in order.curves},
        opened.elastic.base.other_bytes,
        found.left_alone,
        found.outside_budget and found.outside_budget.model_dump(),
    )
    report = build_report(original, recipe, plan, log, calibration=origin.get("calibration"))
    return Outcome(model, opened.tokenizer, plan, recipe, report)
