"""The recipe of a run: what was named, with the user's changes, validated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from spectrim.allocate.plan import Plan
from spectrim.arguments import check_fraction, check_whole
from spectrim.errors import BudgetError, InputError, RecipeError
from spectrim.recipe import Recipe
from spectrim.recipes import DEFAULT_RECIPE, EFFORTS, get_recipe
from spectrim.run.texts import UserText
from spectrim.storage.survey_record import Survey

__all__ = ["check_brought", "check_size", "resolve_recipe"]


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


def resolve_recipe(
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    *,
    keep: float | None = None,
    seed: int | None = None,
    text: UserText = None,
    windows: int | None = None,
    window_length: int | None = None,
    batch: int | None = None,
    bos: str | None = None,
    storage: str | None = None,
    weights: str | None = None,
    effort: str | None = None,
    only: str | Sequence[str] = (),
    skip: str | Sequence[str] = (),
    multiple: int | None = None,
) -> Recipe:
    """A recipe with the user's changes, validated.

    Raises:
        RecipeError: an unknown recipe, a value outside its range, or an effort for a recipe that
            has none.
    """
    check_fraction(keep=keep)
    check_whole(windows=windows, multiple=multiple)
    check_whole(batch=batch)
    check_whole(window_length=window_length, least=2)
    check_whole(seed=seed, least=0, most=2**63 - 1)
    if effort is not None:
        recipe = _recipe_at(effort, recipe)
    chosen = get_recipe(recipe)
    calibration: dict[str, Any] = {"windows": windows, "window_length": window_length}
    shape = getattr(text, "shape", None)
    if shape is not None and len(shape) == 2:
        for name, asked, found in zip(calibration, (windows, window_length), shape, strict=True):
            if asked not in (None, found):
                raise RecipeError(
                    f"{name} is {asked}, and the text is {shape[0]} windows of {shape[1]} tokens"
                )
    calibration["batch"] = batch
    if bos is not None:
        calibration["bos"] = bos
    if isinstance(text, (str, Path)):
        parts = [part.strip() for part in str(text).split(",")]
        calibration["text"] = parts[0] if len(parts) == 1 else parts
    elif text is not None:
        calibration["text"] = f"({type(text).__name__})"
    changes: dict[str, Any] = {
        "calibration": {k: v for k, v in calibration.items() if v is not None},
        "storage": {
            k: v for k, v in {"kind": storage, "weights": weights}.items() if v is not None
        },
    }
    patterns = {"only": only, "skip": skip}
    changes["targets"] = {
        name: (given,) if isinstance(given, str) else tuple(given)
        for name, given in patterns.items()
        if given
    }
    if multiple is not None:
        changes["allocate"] = {"multiple": multiple}
    if keep is not None:
        changes["keep"] = keep
    if seed is not None:
        changes["seed"] = seed
    return chosen.with_changes(**changes)


def _recipe_at(effort: str, recipe: str | Path | Recipe) -> str:
    if not isinstance(effort, str) or effort not in EFFORTS:
        raise RecipeError(f"unknown effort {effort!r}; use {', '.join(EFFORTS)}")
    if recipe != DEFAULT_RECIPE:
        raise RecipeError(f"effort is for the recipe {DEFAULT_RECIPE!r} only, not for {recipe}")
    return EFFORTS[effort]
