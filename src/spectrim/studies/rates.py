"""The rate-distortion curve of a model: several recipes, several sizes, one survey per recipe.

Every finished point is kept on disk, so a run that was cut off goes on where it was, and adding a
size measures only that size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import nn

from spectrim.allocate.rules import RULES
from spectrim.errors import BudgetError, InputError
from spectrim.evaluate.points import CurvePoint, is_dense_format
from spectrim.recipe import Recipe
from spectrim.run.loading import LoadedModel
from spectrim.run.opening import open_job
from spectrim.run.reporting import environment
from spectrim.run.survey.survey import make_survey
from spectrim.run.survey.survey_key import survey_key
from spectrim.run.texts import UserText
from spectrim.storage.survey_record import Survey
from spectrim.studies.quantized import quantized_points
from spectrim.studies.reference import Measured, PointStore, Reference, Size
from spectrim.studies.running import run_and_measure, train_every_size

logger = logging.getLogger(__name__)

STAGE = "curve"


@dataclass
class RateCurve:
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

    def skip(self, note: str, error: BudgetError) -> None:
        """Note a size that is out of reach."""
        self.skipped[note] = str(error)
        logger.warning("%s was skipped: %s", note, error)

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
    formats: Sequence[str] = (),
    store: PointStore | None = None,
) -> RateCurve:
    """Compress with every recipe at every size and measure each result.

    Args:
        reference: the dense model; copies of it are compressed.
        recipes: resolved; their own keep plays no part.
        keeps: sizes, fractions in (0, 1].
        text: calibration text, None for each recipe's.
        formats: number formats, `int8` and `int4`, in which the dense model is measured too.
        store: finished points.

    Raises:
        SpectrimError: a recipe that cannot be run at all; a size out of a recipe's reach is
            skipped and named.
    """
    store, progress = store or PointStore(None), reference.progress
    curve = RateCurve(reference.dense_record())
    progress.start(STAGE, len(recipes) * len(keeps) + len(formats))
    for recipe in recipes:
        sized = [recipe.with_changes(keep=keep) for keep in keeps]
        keys = [store.key(one, reference, text) for one in sized]
        found = [store.find(key) for key in keys]
        missing = sum(one is None for one in found)
        measure = _measuring(reference, recipe, text, store, missing)
        for one, key, known in zip(sized, keys, found, strict=True):
            note = f"{one.name} {one.keep:g}"
            try:
                measured = known or measure(one)
            except BudgetError as error:
                curve.skip(note, error)
            else:
                if known is None:
                    store.keep(key, measured)
                    curve.measured += 1
                curve.points.append(measured.point)
            progress.advance(STAGE, note)
    return _with_formats(curve, reference, formats, store)


def _measuring(
    reference: Reference,
    recipe: Recipe,
    text: UserText,
    store: PointStore,
    missing: int,
) -> Callable[[Recipe], Measured]:
    """How a size of a recipe is measured, once what all its sizes share is there."""
    if missing and recipe.gives_every_size:
        work = None
        if store.folder is not None:
            work = store.folder / f"training-{store.key(_sizeless(recipe), reference, text)}"
        started = time.perf_counter()
        artifact = train_every_size(
            reference.loaded, recipe, text=text, work=work, progress=reference.progress
        )
        seconds = time.perf_counter() - started
        return lambda one: _slice(reference, artifact, one.keep, one.name, seconds)
    survey = _survey(reference.loaded, recipe, text) if missing > 1 else None
    return lambda one: run_and_measure(reference, one, text=text, survey=survey)


def _sizeless(recipe: Recipe) -> Recipe:
    """The same for every size, so that a later size finds the training of an earlier one."""
    return recipe.with_changes(keep=1.0)


def _survey(loaded: LoadedModel, recipe: Recipe, text: UserText) -> Survey | None:
    """One survey for all sizes, where the recipe's flow can use it."""
    if recipe.flow != "one-shot" and not RULES[recipe.allocate.rule].surveys:
        return None
    if recipe.flow == "learned":
        return None
    job = open_job(loaded, recipe, text=text)
    return replace(make_survey(job), key=survey_key(loaded, recipe, job.windows))


def elastic_curve(
    reference: Reference,
    artifact: Resizable,
    keeps: Sequence[float],
    *,
    name: str,
    formats: Sequence[str] = (),
    store: PointStore | None = None,
) -> RateCurve:
    """Measure an elastic artifact at several sizes; nothing is decomposed or trained.

    Args:
        reference: the dense model that the artifact was made from.
        artifact: resized in place.
        keeps: sizes, fractions in (0, 1].
        name: of the artifact, in tables and pictures.
        formats: number formats in which the dense model is measured too.
        store: finished points of the dense model; slices are always measured.

    Raises:
        InputError: no size is within the artifact's reach.
    """
    store, progress = store or PointStore(None), reference.progress
    curve = RateCurve(reference.dense_record())
    progress.start(STAGE, len(keeps) + len(formats))
    for keep in keeps:
        note = f"{name} {keep:g}"
        try:
            curve.points.append(_slice(reference, artifact, keep, name, None).point)
            curve.measured += 1
        except BudgetError as error:
            curve.skip(note, error)
        progress.advance(STAGE, note)
    return _with_formats(curve, reference, formats, store)


def _slice(
    reference: Reference, artifact: Resizable, keep: float, name: str, seconds: float | None
) -> Measured:
    """One size of an artifact; it took as long as its slice, or as the training given."""
    started = time.perf_counter()
    plan = artifact.resize(keep)
    taken = time.perf_counter() - started if seconds is None else seconds
    size = elastic_size(artifact.model, plan, keep, reference)
    return reference.measure(artifact.model, size, recipe=name, seconds=taken)


def _with_formats(
    curve: RateCurve, reference: Reference, formats: Sequence[str], store: PointStore
) -> RateCurve:
    """The curve with the dense model in number formats, which is the last that is measured."""
    for weights in formats:
        curve.points += quantized_points(reference, [weights], store=store)
        reference.progress.advance(STAGE, weights)
    reference.progress.finish(STAGE)
    if not any(not is_dense_format(point) for point in curve.points):
        name, reason = list(curve.skipped.items())[-1]
        raise InputError(f"no size could be measured; {name} was the last: {reason}")
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
