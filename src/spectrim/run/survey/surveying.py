"""A survey that can be kept: made from a loaded model, with its key; and a model cut from one."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from torch import nn

from spectrim.allocate.sensitivity import TABLE
from spectrim.errors import InputError
from spectrim.model.experts.unfold import fold
from spectrim.recipe import Recipe, validated
from spectrim.run.compress import Outcome, run_recipe
from spectrim.run.loading import LoadedModel, load_model
from spectrim.run.opening import open_job, other_bytes
from spectrim.run.options import RunOptions
from spectrim.run.planning import plan_from_survey
from spectrim.run.survey.survey import make_survey, surveyed_choice
from spectrim.run.survey.survey_key import survey_key
from spectrim.run.texts import UserText
from spectrim.storage.shared_work import Work
from spectrim.storage.survey_record import Survey

DEFAULT_SCORES = ("first_order", "second_order")
"""One backward pass over a few windows gives both; every rule can then be planned."""

SCORES = (*DEFAULT_SCORES, "kfac", "measured", TABLE)


def survey_model(
    loaded: LoadedModel,
    recipe: Recipe,
    options: RunOptions = RunOptions(),
    *,
    text: UserText = None,
    scores: Collection[str] | None = None,
    work: Work | None = None,
) -> Survey:
    """Survey a loaded model, which stays as it is.

    Args:
        loaded: the model.
        recipe: objective, calibration and default rule.
        options: how and where; all processes of their team get the survey.
        text: the user's calibration text, None for the recipe's.
        scores: any of `first_order`, `second_order`, `kfac`, `measured`, `table`; by default the
            first two and what the recipe's rule needs.
        work: where surveyed blocks are kept and found again.

    Raises:
        InputError: an unknown score.
        SpectrimError: an unfit model or text, or statistics that are not finite.
    """
    wanted = set(DEFAULT_SCORES) if scores is None else set(scores)
    wanted |= recipe.allocate.needed_scores
    unknown = sorted(wanted - set(SCORES))
    if unknown:
        raise InputError(f"unknown score {unknown[0]!r}; a survey can hold {', '.join(SCORES)}")
    brought = {"scores": sorted(wanted)}
    job = open_job(loaded, recipe, options, text=text, work=work, brought=brought)
    try:
        key = survey_key(loaded, job.recipe, job.windows)
        made = make_survey(job, scores=wanted)
        beside = other_bytes(loaded.model, job.anatomy, loaded.stored_dtype)
        return replace(made, key=key, model_name=loaded.name, other_bytes=beside)
    finally:
        if loaded.onloader is None:
            fold(loaded.model)


def cut_survey(
    loaded: LoadedModel,
    survey: Survey,
    *,
    keep: float | None = None,
    size: str | int | None = None,
    score: str | None = None,
) -> Outcome:
    """Cut a surveyed model to a size by the survey's rule, without text or decompositions.

    With a score, ranks are those of the knapsack that minimizes it.

    Raises:
        ArtifactError: the survey is of another model.
        BudgetError: the size is out of reach.
    """
    rule = None if score is None else "knapsack"
    plan = plan_from_survey(survey, keep=keep, size=size, rule=rule, score=score)
    # What follows the cut in the recipe would need text: a resized model is a plain one-shot cut.
    recipe = validated(Recipe, survey.recipe, source=f"the survey of {survey.model_name}")
    recipe = recipe.with_changes(
        keep=plan.keep,
        flow="one-shot",
        decompose=surveyed_choice(recipe.decompose).model_dump(),
        refine=[],
        learn=None,
    )
    return run_recipe(loaded, recipe, RunOptions(measure=False), plan=plan, survey=survey)


def resize_survey(
    surveyed: Survey,
    options: RunOptions = RunOptions(),
    *,
    keep: float | None,
    size: str | int | None,
    base: str | Path | nn.Module | None = None,
    score: str | None = None,
) -> Outcome:
    """A surveyed model at one size: the survey's decompositions in the base model's place.

    Args:
        surveyed: with the name of its model.
        options: how the model is loaded.
        keep: fraction of the target bytes.
        size: instead of keep, of the whole checkpoint.
        base: the model, where it does not lie under that name.
        score: that ranks components, in place of the recipe's rule.
    """
    return cut_survey(
        load_model(surveyed.model_name if base is None else base, options, whole=True),
        surveyed,
        keep=keep,
        size=size,
        score=score,
    )
