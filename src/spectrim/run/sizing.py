"""What a size alone means: whatever loses least in so many bytes, if it is fast enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectrim.allocate.forms import AUTO, dense_forms
from spectrim.allocate.rules import RULES
from spectrim.formats import format_of
from spectrim.recipe import Recipe
from spectrim.run.loading import LoadedModel

_SAID = ("storage", "weights", "plan", "survey")
"""Words that say how targets are stored."""


def for_size(recipe: Recipe, asked: Mapping[str, Any], loaded: LoadedModel) -> Recipe:
    """The recipe with one plan over low rank and integers, where a size was all that was given.

    Whoever gives a size does not care what is cut. Of the formats those are left that the model's
    device multiplies about as fast as plain numbers.

    Args:
        recipe: resolved.
        asked: the user's words.
        loaded: the model.
    """
    weighs = recipe.flow != "learned" and RULES[recipe.allocate.rule].weighs_forms
    said = any(asked.get(name) is not None for name in _SAID)
    if asked.get("size") is None or said or not weighs or recipe.storage.weights != "native":
        return recipe
    device, dtype = loaded.device, loaded.stored_dtype
    known = [form.weights for form in dense_forms(AUTO) if form.coded]
    fast = [name for name in known if format_of(name).fast(device, dtype)]
    if not fast:
        return recipe
    loaded.notes.append(
        f"a size was given, so the plan may also round to {', '.join(fast)}, which {device.type} "
        "multiplies about as fast as plain numbers; --weights native only cuts, --weights auto has "
        "all formats to choose from"
    )
    return recipe.with_changes(storage={"weights": AUTO, "formats": tuple(fast)})
