"""How much calibration text a recipe needs: quality against the number of windows, over seeds.

AA-SVD (arXiv 2604.02119) draws this for its own recipe at one keep. Every seed draws its own
windows, so that the spread over seeds is what the choice of text alone does to a result.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from spectrim.errors import InputError, TextError
from spectrim.evaluate.points import CurvePoint
from spectrim.recipe import Recipe
from spectrim.recipes import DEFAULT_RECIPE
from spectrim.report.drawing import new_figure
from spectrim.report.study_figures import draw_calibration
from spectrim.report.tables import rows_csv
from spectrim.run.cost import LONG
from spectrim.run.reporting import environment
from spectrim.run.resolving import resolve_recipe
from spectrim.run.sources import sources_of
from spectrim.run.texts import UserText, own_text
from spectrim.storage.json_file import as_json
from spectrim.storage.whole_file import write_text
from spectrim.studies.files import open_study, save_pictures
from spectrim.studies.measure import Measure, different_names, measured_on
from spectrim.studies.reference import PointStore, Reference
from spectrim.studies.running import run_and_measure

logger = logging.getLogger(__name__)

STAGE = "calibration"


@dataclass(frozen=True)
class CalibrationPoint:
    """One run on a number of windows.

    Attributes:
        windows: of calibration text.
        seed: of their positions.
        point: what came out.
    """

    windows: int
    seed: int
    point: CurvePoint

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {"windows": self.windows, "seed": self.seed, **self.point.record()}


@dataclass
class CalibrationStudy:
    """All runs.

    Attributes:
        dense: numbers and protocol of the dense model.
        keep: asked for.
        window_length: tokens per calibration window.
        points: recipes outermost, then windows, then seeds.
        skipped: `recipe windows` -> why there is no point.
        measured: how many points were measured now; the others came from disk.
    """

    dense: dict[str, Any]
    keep: float
    window_length: int
    points: list[CalibrationPoint] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    measured: int = 0

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "format_version": 1,
            "dense": self.dense,
            "keep": self.keep,
            "window_length": self.window_length,
            "points": [point.record() for point in self.points],
            "skipped": self.skipped,
            "environment": environment(),
        }


def study_calibration(
    reference: Reference,
    recipes: Sequence[Recipe],
    windows: Sequence[int],
    seeds: Sequence[int],
    *,
    text: UserText = None,
    store: PointStore | None = None,
) -> CalibrationStudy:
    """Run every recipe on every number of windows with every seed.

    Args:
        reference: the dense model; copies of it are compressed.
        recipes: resolved, all with the keep to study.
        windows: numbers of calibration windows.
        seeds: of the recipes; another seed calibrates on other windows.
        text: documents that the recipes cannot name, None for the recipes' sources.
        store: finished points.

    Raises:
        InputError: no number of windows could be had.
        SpectrimError: a recipe that cannot be run at all; a number of windows that the text is
            too short for is skipped and named.
    """
    store, progress = store or PointStore(None), reference.progress
    first = recipes[0]
    length = first.calibration.window_length or LONG
    study = CalibrationStudy(reference.dense_record(), first.keep, length)
    progress.start(STAGE, len(recipes) * len(windows) * len(seeds))
    for recipe in recipes:
        for count in windows:
            for seed in seeds:
                note = f"{recipe.name} {count} windows, seed {seed}"
                one = recipe.with_changes(seed=seed, calibration={"windows": count})
                key = store.key(one, reference, text)
                measured = store.find(key)
                try:
                    if measured is None:
                        measured = run_and_measure(reference, one, text=text)
                        store.keep(key, measured)
                        study.measured += 1
                    study.points.append(CalibrationPoint(count, seed, measured.point))
                except TextError as error:
                    study.skipped[note] = str(error)
                    logger.warning("%s was skipped: %s", note, error)
                progress.advance(STAGE, note)
    progress.finish(STAGE)
    if not study.points:
        name, reason = list(study.skipped.items())[-1]
        raise InputError(f"no number of windows could be had; {name} was the last: {reason}")
    return study


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
