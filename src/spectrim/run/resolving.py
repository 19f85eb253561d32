"""The recipe of a run: what was named, with the user's changes, validated.

A wrong word is answered at once, so nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.arguments import check_fraction, check_whole
from spectrim.errors import BudgetError, RecipeError
from spectrim.recipe import Recipe
from spectrim.recipes import DEFAULT_RECIPE, EFFORTS, get_recipe
from spectrim.run.word import among, takes
from spectrim.run.words import WORDS, RecipeWords

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from spectrim.run.texts import UserText

WHOLE = (
    (1, None, ("windows", "multiple", "batch")),
    (2, None, ("window_length",)),
    (0, 2**63 - 1, ("seed",)),
)
"""Least and largest value of words that are whole numbers."""

SIZES = ("plan", "keep", "size", "max_loss", "energy")
"""Words that say how large a result is; a run has one of them."""


def check_words(asked: Mapping[str, Any]) -> None:
    """Refuse words of a run that are wrong by themselves, before anything is loaded.

    Args:
        asked: those given, by name; None for the others.

    Raises:
        RecipeError: see `resolve_recipe`.
        BudgetError: see `check_size`.
    """
    check_size(asked)
    resolve_recipe(asked.get("recipe") or DEFAULT_RECIPE, **among(asked, RecipeWords))


def check_size(asked: Mapping[str, Any]) -> None:
    """Refuse two words for the size of a result, and costs that are none.

    Args:
        asked: words of a run by name, of which `SIZES` are looked at.

    Raises:
        BudgetError: names both, or the value.
    """
    given = [name for name in SIZES if asked.get(name) is not None]
    if len(given) > 1:
        raise BudgetError(f"{given[0]} and {given[1]} exclude each other; give one")
    check_fraction(energy=asked.get("energy"))
    loss = asked.get("max_loss")
    number = isinstance(loss, Real) and not isinstance(loss, bool)
    if loss is not None and not (number and 0 < float(loss) < float("inf")):
        raise BudgetError(f"max_loss is {loss}; it is a loss in nats per token, e.g. 0.02")


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
