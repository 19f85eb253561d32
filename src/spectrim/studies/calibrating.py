"""How much calibration text recipes need, with table and picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spectrim.api import resolve_recipe
from spectrim.errors import InputError
from spectrim.measure.calibration import CalibrationStudy, study_calibration
from spectrim.recipe import Recipe
from spectrim.recipes import DEFAULT_RECIPE
from spectrim.report.content import as_json
from spectrim.report.drawing import new_figure
from spectrim.report.study_figures import draw_calibration
from spectrim.report.tables import rows_csv
from spectrim.run.sources import sources_of
from spectrim.run.texts import own_text
from spectrim.studies.files import open_study, save_pictures, write_text
from spectrim.studies.measure import Measure, different_names, measured_on

__all__ = ["WINDOWS", "calibration_study"]

WINDOWS = (8, 16, 32, 64, 128, 256)


def calibration_study(
    model: str | Path | nn.Module,
    *,
    recipes: Sequence[str | Path | Recipe] = (DEFAULT_RECIPE,),
    windows: Sequence[int] = WINDOWS,
    seeds: Sequence[int] = (0,),
    keep: float | None = None,
    measure: Measure | None = None,
    output: str | Path | None = None,
    **calibration: Any,
) -> CalibrationStudy:
    """Quality against the number of calibration windows, for several recipes and seeds.

    Args:
        model: a hub name, a folder, or a model object.
        recipes: to draw one line each.
        windows: numbers of calibration windows.
        seeds: of window positions and everything else random.
        keep: fraction of the target bytes, None for the first recipe's.
        measure: evaluation text and its protocol.
        output: folder for `calibration.json`, `.csv`, `.png`, `.svg` and the finished points,
            which a later call takes up again.
        **calibration: `text` and `window_length` as in `spectrim.compress`.

    Raises:
        SpectrimError: unknown recipes, texts or models; texts too short for every number.
    """
    measure = measured_on(measure, calibration.get("text"))
    if not recipes or not windows or not seeds:
        raise InputError("a calibration study needs recipes, numbers of windows, and seeds")
    if min(windows) < 1:
        raise InputError(f"{min(windows)} calibration windows are none; give numbers from 1")
    if isinstance(calibration.get("text"), Tensor):
        raise InputError("ready windows have one number; give a text, a source or documents")
    resolved = [resolve_recipe(recipe, keep=keep, **calibration) for recipe in recipes]
    resolved = different_names([one.with_changes(keep=resolved[0].keep) for one in resolved])
    folder, store = open_study(
        output,
        writes=[f"calibration.{kind}" for kind in ("json", "csv", "png", "svg")],
        sources=sources_of(model=model, text=[calibration.get("text"), measure.text]),
    )
    found = study_calibration(
        measure.reference(model),
        resolved,
        sorted(set(windows)),
        list(dict.fromkeys(seeds)),
        text=own_text(calibration.get("text")),
        store=store,
    )
    if folder is not None:
        record = found.record()
        write_text(folder / "calibration.json", as_json(record))
        write_text(folder / "calibration.csv", rows_csv(record["points"]))
        with new_figure() as (figure, axes):
            draw_calibration(
                axes, record["points"], dense=found.dense["perplexity"], keep=found.keep
            )
            save_pictures(figure, folder / "calibration")
    return found
