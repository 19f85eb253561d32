"""The rate-distortion curve of a model: several recipes, several sizes, one survey per recipe.

Every finished point is kept on disk, so a run that was cut off goes on where it was, and adding a
size measures only that size.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import nn

from spectrim.errors import BudgetError, InputError
from spectrim.evaluate.curve import CurvePoint
from spectrim.measure.measuring import Measured, PointStore, Reference, Size
from spectrim.recipe import Recipe
from spectrim.run.compress import run_recipe
from spectrim.run.job import Progress, Silent
from spectrim.run.loading import LoadedModel
from spectrim.run.opening import open_job
from spectrim.run.reporting import environment
from spectrim.run.survey.survey import make_survey
from spectrim.run.survey.survey_key import survey_key
from spectrim.run.texts import UserText
from spectrim.storage.survey_record import Survey

__all__ = ["Curve", "Resizable", "elastic_curve", "recipe_curve"]

logger = logging.getLogger(__name__)


@dataclass
class Curve:
    """Measured points and how they were measured.

    Attributes:
        dense: numbers and protocol of the dense model.
        points: in the order of recipes, then sizes.
        skipped: `recipe keep` -> why there is no point.
        measured: how many points were measured now; the others came from disk.
    """

    dense: dict[str, Any]
    points: list[CurvePoint] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    measured: int = 0

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return {
            "format_version": 1,
            "dense": self.dense,
            "points": [point.record() for point in self.points],
            "skipped": self.skipped,
            "environment": environment(),
        }


class Resizable(Protocol):
    """An elastic model: one model in memory that takes any size."""

    @property
    def model(self) -> nn.Module:
        """At the current size."""
        ...

    def resize(self, keep: float) -> Any:
        """Change the size; returns the plan."""
        ...


def recipe_curve(
    reference: Reference,
    recipes: Sequence[Recipe],
    keeps: Sequence[float],
    *,
    text: UserText = None,
    store: PointStore | None = None,
    progress: Progress | None = None,
) -> Curve:
    """Compress with every recipe at every size and measure each result.

    Args:
        reference: the dense model; copies of it are compressed.
        recipes: resolved; their own keep plays no part.
        keeps: sizes, fractions in (0, 1].
        text: calibration text, None for each recipe's.
        store: finished points.
        progress: told of every point.

    Raises:
        SpectrimError: a recipe that cannot be run at all; a size out of a recipe's reach is
            skipped and named.
    """
    store, progress = store or PointStore(None), progress or Silent()
    curve = Curve(reference.dense_record())
    stage = "curve"
    progress.start(stage, len(recipes) * len(keeps))
    for recipe in recipes:
        sized = [recipe.with_changes(keep=keep) for keep in keeps]
        keys = [store.key(one, reference, text) for one in sized]
        found = [store.find(key) for key in keys]
        missing = sum(one is None for one in found)
        survey = _survey(reference.loaded, recipe, text) if missing > 1 else None
        for one, key, known in zip(sized, keys, found, strict=True):
            note = f"{one.name} {one.keep:g}"
            try:
                measured = known or _measure(reference, one, text, survey)
            except BudgetError as error:
                curve.skipped[note] = str(error)
                logger.warning("%s was skipped: %s", note, error)
            else:
                if known is None:
                    store.keep(key, measured)
                    curve.measured += 1
                curve.points.append(measured.point)
            progress.advance(stage, note)
    progress.finish(stage)
    if not curve.points:
        raise InputError(
            f"no size could be measured; the last was: {[*curve.skipped.values()][-1]}"
        )
    return curve


def _checked(curve: Curve) -> Curve:
    if not curve.points:
        name, reason = list(curve.skipped.items())[-1]
        raise InputError(f"no size could be measured; {name} was the last: {reason}")
    return curve


def _survey(loaded: LoadedModel, recipe: Recipe, text: UserText) -> Survey | None:
    """One survey for all sizes, where the recipe's flow can use it."""
    if recipe.flow != "one-shot" and recipe.allocate.rule == "uniform":
        return None
    if recipe.flow == "learned":
        return None
    job = open_job(loaded, recipe, text=text)
    return replace(make_survey(job), key=survey_key(loaded, recipe, job.windows))


def _measure(
    reference: Reference, recipe: Recipe, text: UserText, survey: Survey | None
) -> Measured:
    dense = reference.loaded
    dtype = next(dense.model.parameters()).dtype
    started = time.perf_counter()
    outcome = run_recipe(
        replace(dense, model=copy.deepcopy(dense.model)), recipe, text=text, survey=survey
    )
    seconds = time.perf_counter() - started
    # Rounded to the stored dtype by the run; measured in the dtype that the dense model was.
    model = outcome.model.to(dtype)
    size = Size.from_report(outcome.report)
    return reference.measure(model, size, recipe=recipe.name, seconds=seconds)


def elastic_curve(
    reference: Reference,
    artifact: Resizable,
    keeps: Sequence[float],
    *,
    name: str,
    progress: Progress | None = None,
) -> Curve:
    """Measure an elastic artifact at several sizes; nothing is decomposed or trained.

    Args:
        reference: the dense model that the artifact was made from.
        artifact: resized in place.
        keeps: sizes, fractions in (0, 1].
        name: of the artifact, in tables and pictures.
        progress: told of every point.

    Raises:
        InputError: no size is within the artifact's reach.
    """
    progress = progress or Silent()
    curve = Curve(reference.dense_record())
    stage = "curve"
    progress.start(stage, len(keeps))
    for keep in keeps:
        started = time.perf_counter()
        try:
            plan = artifact.resize(keep)
        except BudgetError as error:
            curve.skipped[f"{name} {keep:g}"] = str(error)
            logger.warning("%s at %g was skipped: %s", name, keep, error)
        else:
            seconds = time.perf_counter() - started
            size = elastic_size(artifact.model, plan, keep, reference)
            measured = reference.measure(artifact.model, size, recipe=name, seconds=seconds)
            curve.points.append(measured.point)
            curve.measured += 1
        progress.advance(stage, f"{name} {keep:g}")
    progress.finish(stage)
    if not curve.points:
        raise InputError(
            f"no size could be measured; the last was: {[*curve.skipped.values()][-1]}"
        )
    return curve


def elastic_size(model: nn.Module, plan: Any, keep: float, reference: Reference) -> Size:
    """Bytes of an elastic model at its current size, from the plan it carries out."""
    stored = sum(entry.bytes for entry in plan.entries)
    dense = sum(entry.dense_bytes for entry in plan.entries)
    names = {f"{entry.name}.weight" for entry in plan.entries}
    itemsize = reference.loaded.stored_dtype.itemsize
    weights = others = 0
    for name, parameter in reference.loaded.model.named_parameters():
        if name in names:
            weights += parameter.numel()
        elif not any(name.startswith(f"{entry.name}.") for entry in plan.entries):
            others += parameter.numel() * itemsize
    return Size(keep, stored, dense, stored + others, weights)
