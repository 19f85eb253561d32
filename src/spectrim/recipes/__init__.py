"""Presets: published methods and our default as recipes over the same parts."""

from spectrim.recipes.default import DEFAULT_RECIPE, EFFORTS
from spectrim.recipes.presets import PRESETS, get_recipe

__all__ = ["DEFAULT_RECIPE", "EFFORTS", "PRESETS", "get_recipe"]
