"""From what the user says to a recipe: a preset or file, and the changes to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectrim.errors import BudgetError, RecipeError
from spectrim.recipe import Recipe
from spectrim.recipes import DEFAULT_RECIPE, EFFORTS, get_recipe
from spectrim.run.texts import UserText

__all__ = ["resolve_recipe"]


def resolve_recipe(
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    *,
    keep: float | None = None,
    seed: int | None = None,
    text: UserText = None,
    windows: int | None = None,
    window_length: int | None = None,
    storage: str | None = None,
    weights: str | None = None,
    effort: str | None = None,
) -> Recipe:
    """A recipe with the user's changes, validated.

    Raises:
        RecipeError: an unknown recipe, a value outside its range, or an effort for a recipe that
            has none.
    """
    if effort is not None:
        recipe = _recipe_at(effort, recipe)
    chosen = get_recipe(recipe)
    if keep is not None and not 0 < keep <= 1:
        raise BudgetError(f"keep is {keep}; it is a fraction in (0, 1], for example 0.6")
    calibration: dict[str, Any] = {"windows": windows, "window_length": window_length}
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
    if keep is not None:
        changes["keep"] = keep
    if seed is not None:
        changes["seed"] = seed
    return chosen.with_changes(**changes)


def _recipe_at(effort: str, recipe: str | Path | Recipe) -> str:
    if effort not in EFFORTS:
        raise RecipeError(f"unknown effort {effort!r}; use {', '.join(EFFORTS)}")
    if recipe != DEFAULT_RECIPE:
        raise RecipeError(f"effort is for the recipe {DEFAULT_RECIPE!r} only, not for {recipe}")
    return EFFORTS[effort]
