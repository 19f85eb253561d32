"""Presets: published methods and our default as recipes over the same parts."""

from spectrim.recipes.presets import PRESETS, get_recipe

__all__ = ["PRESETS", "get_recipe"]
