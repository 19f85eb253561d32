"""What a survey's numbers depend on, taken from a model, its windows and a recipe."""

from __future__ import annotations

from spectrim.data.tokens import tokenizer_hash
from spectrim.data.windows import Windows
from spectrim.decompose import OBJECTIVES
from spectrim.recipe import Recipe
from spectrim.run.loading import LoadedModel
from spectrim.run.survey.survey import surveyed_choice
from spectrim.storage.survey_record import SurveyKey


def survey_key(loaded: LoadedModel, recipe: Recipe, windows: Windows | None) -> SurveyKey:
    """The key of a survey of this model; call it before the model is changed.

    Of the recipe only the surveyed objective with its options and the gradient windows matter:
    size, rule, refinement and storage are chosen later.
    """
    choice = surveyed_choice(recipe.decompose)
    options = OBJECTIVES[choice.objective].accepted(choice.model_dump())
    settings = {f"decompose.{name}": value for name, value in options.items()}
    settings["decompose.objective"] = choice.objective
    settings["decompose.clip"] = choice.clip
    for name in ("gradient_windows", "held_out"):
        settings[f"allocate.{name}"] = getattr(recipe.allocate, name)
    return SurveyKey(
        model=loaded.identity(),
        tokenizer="" if loaded.tokenizer is None else tokenizer_hash(loaded.tokenizer),
        windows="" if windows is None else windows.fingerprint(),
        settings=settings,
    )
