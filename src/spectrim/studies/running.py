"""One run of a recipe on a copy of the dense model, measured; and trainings that give every size.

The dense model of a study is never changed: what a run replaces are the modules of its copy.
"""

from __future__ import annotations

import copy
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from spectrim.errors import RecipeError
from spectrim.recipe import Recipe
from spectrim.run.compress import Outcome, run_recipe
from spectrim.run.learned.elastic import ElasticModel
from spectrim.run.loading import LoadedModel
from spectrim.run.options import RunOptions
from spectrim.run.progress import Progress, Silent
from spectrim.run.texts import UserText
from spectrim.storage.elastic import Elastic
from spectrim.storage.survey_record import Survey
from spectrim.storage.work import open_work
from spectrim.studies.reference import Measured, Reference, Size


def run_on_copy(
    dense: LoadedModel,
    recipe: Recipe,
    *,
    text: UserText = None,
    survey: Survey | None = None,
) -> Outcome:
    """Compress a copy; the result is in the dense model's working dtype.

    Rounded to the stored dtype by the run, it is measured in the dtype that the dense model is.
    """
    dtype = next(dense.model.parameters()).dtype
    outcome = run_recipe(
        replace(dense, model=copy.deepcopy(dense.model)),
        recipe,
        RunOptions(measure=False),
        text=text,
        survey=survey,
    )
    outcome.model.to(dtype)
    return outcome


def run_and_measure(
    reference: Reference,
    recipe: Recipe,
    *,
    text: UserText = None,
    survey: Survey | None = None,
) -> Measured:
    """Compress a copy of the reference's model and measure it.

    Raises:
        SpectrimError: the recipe cannot be run on this model or text.
    """
    started = time.perf_counter()
    outcome = run_on_copy(reference.loaded, recipe, text=text, survey=survey)
    seconds = time.perf_counter() - started
    size = Size.from_report(outcome.report)
    return reference.measure(outcome.model, size, recipe=recipe.name, seconds=seconds)


def train_every_size(
    dense: LoadedModel,
    recipe: Recipe,
    *,
    text: UserText = None,
    work: Path | None = None,
    progress: Progress | None = None,
) -> ElasticModel:
    """Train once on a copy; any size is then a slice.

    Args:
        dense: the model.
        recipe: one of `gives_every_size`; its keep plays no part.
        text: calibration text, None for the recipe's.
        work: folder for checkpoints, from which a training that was cut off goes on.
        progress: told of the steps.

    Raises:
        RecipeError: the recipe's training gives a single size.
    """
    if not recipe.gives_every_size:
        raise RecipeError(f"recipe {recipe.name!r} learns one size at a time")
    with nullcontext() if work is None else open_work(work) as folder:
        outcome = run_recipe(
            replace(dense, model=copy.deepcopy(dense.model)),
            # Every training reaches the whole model, wherever it ends.
            recipe.with_changes(keep=1.0),
            RunOptions(measure=False, progress=progress or Silent()),
            text=text,
            work=folder,
        )
    assert outcome.elastic is not None  # every run names its base
    rounded = _as_stored(outcome.elastic, dense.stored_dtype)
    return ElasticModel(replace(dense, model=copy.deepcopy(dense.model)), rounded)


def _as_stored(elastic: Elastic, dtype: torch.dtype) -> Elastic:
    """The artifact with its factors rounded as its file holds them."""
    factors = {n: (up.to(dtype), down.to(dtype)) for n, (up, down) in elastic.factors.items()}
    return replace(elastic, factors=factors)
