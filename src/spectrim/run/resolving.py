"""The recipe of a run: what was named, with the user's changes, validated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from spectrim.allocate.plan import Plan
from spectrim.arguments import check_fraction, check_whole
from spectrim.errors import BudgetError, InputError, RecipeError
from spectrim.recipe import Recipe
from spectrim.recipes import DEFAULT_RECIPE, EFFORTS, get_recipe
from spectrim.run.texts import UserText
from spectrim.run.word import takes
from spectrim.run.words import WORDS, RecipeWords
from spectrim.storage.survey_record import Survey

if TYPE_CHECKING:
    from typing_extensions import Unpack

WHOLE = (
    (1, None, ("windows", "multiple", "batch")),
    (2, None, ("window_length",)),
    (0, 2**63 - 1, ("seed",)),
)
"""Least and largest value of words that are whole numbers."""


def check_brought(model: object, *, plan: object = None, survey: object = None) -> None:
    """Refuse what is no model, plan or survey, nor the name of one.

    Raises:
        InputError: names the argument and what it is.
    """
    kinds = {
        "model": (model, nn.Module, "a hub name, a folder, or a loaded model"),
        "plan": (plan, Plan, "a plan or the file of one"),
        "survey": (survey, Survey, "a survey or the folder of one"),
    }
    for name, (value, kind, expected) in kinds.items():
        absent = value is None and name != "model"
        if not absent and (not isinstance(value, str | Path | kind) or value == ""):
            raise InputError(
                f"{name} is {value!r:.80} ({type(value).__name__}); expected {expected}"
            )


def check_size(plan: object, keep: float | None, size: str | int | None) -> None:
    """Refuse two words for the size of a result.

    Raises:
        BudgetError: names both.
    """
    given = {"plan": plan, "keep": keep, "size": size}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise BudgetError(f"{named[0]} and {named[1]} exclude each other; give one")


@takes(RecipeWords)
def resolve_recipe(
    recipe: str | Path | Recipe = DEFAULT_RECIPE, **words: Unpack[RecipeWords]
) -> Recipe:
    """A recipe with the user's changes, validated.

    Args:
        recipe: a preset's name, a YAML file, or a recipe.
        **words: what to change, by the short names of its fields; None and () leave it.

    Raises:
        RecipeError: an unknown recipe, a value outside its range, or an effort for a recipe that
            has none.
    """
    asked: dict[str, Any] = {n: v for n, v in words.items() if v is not None}
    check_fraction(keep=asked.get("keep"))
    for least, most, names in WHOLE:
        check_whole(least=least, most=most, **{name: asked.get(name) for name in names})
    if "effort" in asked:
        recipe = _recipe_at(asked.pop("effort"), recipe)
    chosen = get_recipe(recipe)
    text = asked.get("text")
    _check_shape(text, asked)
    if isinstance(text, (str, Path)):
        parts = [part.strip() for part in str(text).split(",")]
        asked["text"] = parts[0] if len(parts) == 1 else parts
    elif text is not None:
        asked["text"] = f"({type(text).__name__})"
    for name in ("only", "skip"):
        given = asked.pop(name, ())
        if given:
            asked[name] = (given,) if isinstance(given, str) else tuple(given)
    changes: dict[str, Any] = {}
    for name, value in asked.items():
        section, _, field = str(WORDS[name].field).rpartition(".")
        if section:
            changes.setdefault(section, {})[field] = value
        else:
            changes[field] = value
    return chosen.with_changes(**changes)


def _check_shape(text: UserText, asked: Mapping[str, Any]) -> None:
    """Refuse numbers that token windows (N, T) contradict.

    Raises:
        RecipeError: names both.
    """
    shape = getattr(text, "shape", ())
    if len(shape) != 2:
        return
    for name, found in zip(("windows", "window_length"), shape, strict=True):
        if asked.get(name) not in (None, found):
            raise RecipeError(
                f"{name} is {asked[name]}, and the text is {shape[0]} windows of {shape[1]} tokens"
            )


def _recipe_at(effort: str, recipe: str | Path | Recipe) -> str:
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise RecipeError(f"unknown effort {effort!r}; use {', '.join(EFFORTS)}")
    if recipe != DEFAULT_RECIPE:
        raise RecipeError(f"effort is for the recipe {DEFAULT_RECIPE!r} only, not for {recipe}")
    return EFFORTS[effort]
