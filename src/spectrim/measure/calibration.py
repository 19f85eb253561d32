"""How much calibration text a recipe needs: quality against the number of windows, over seeds.

AA-SVD (arXiv 2604.02119) draws this for its own recipe at one keep. Every seed draws its own
windows, so that the spread over seeds is what the choice of text alone does to a result.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from spectrim.errors import InputError, TextError
from spectrim.evaluate.curve import CurvePoint
from spectrim.measure.measuring import PointStore, Reference
from spectrim.measure.running import run_and_measure
from spectrim.recipe import Recipe
from spectrim.run.cost import LONG
from spectrim.run.reporting import environment
from spectrim.run.texts import UserText

__all__ = ["CalibrationPoint", "CalibrationStudy", "study_calibration"]

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
