"""What the pieces in a work folder depend on: everything that a resumed run must share."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from spectrim.allocate.plan import Plan
from spectrim.data.windows import Windows
from spectrim.recipe import Recipe
from spectrim.run.loading import LoadedModel
from spectrim.storage.survey_record import Survey

PROSE = {"title", "paper", "equation", "differences"}

WITHOUT_EFFECT = ("learn.recompute", "learn.checkpoint_every")
"""What a run out of memory may be resumed with: the result is the same."""


def flat_recipe(recipe: Recipe) -> dict[str, Any]:
    """Every field of a recipe that influences the result, under a dotted name."""
    flat: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
            for number, inner in enumerate(value):
                walk(inner, f"{path}.{number}")
        else:
            flat[path] = value

    walk(recipe.model_dump(mode="json", exclude=PROSE), "")
    return {name: value for name, value in flat.items() if name not in WITHOUT_EFFECT}


def run_identity(
    loaded: LoadedModel,
    recipe: Recipe,
    windows: Windows | None,
    *,
    plan: Plan | None = None,
    survey: Survey | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Flat plain data: recipe, model, text, precision, and what the user brought.

    Call it before the model is changed. Where blocks lie while nobody works on them plays no
    part, so a run that was begun in memory may go on out of core.

    Args:
        loaded: the model.
        recipe: resolved.
        windows: calibration windows, None without any.
        plan: the user's.
        survey: the user's.
        more: further settings that the pieces depend on.
    """
    config = getattr(loaded.model, "config", None)
    weight = next(loaded.model.parameters())
    identity = {
        **flat_recipe(recipe),
        "model": loaded.identity(),
        "model revision": getattr(config, "_commit_hash", None),
        "windows": None if windows is None else windows.fingerprint(),
        "text": None if windows is None else list(windows.text_sha256),
        "working dtype": str(weight.dtype).removeprefix("torch."),
        "stored dtype": str(loaded.stored_dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "plan": None if plan is None else _plan_hash(plan),
        "survey": None if survey is None or survey.key is None else survey.key.model_dump(),
    }
    return {**identity, **more}


def _plan_hash(plan: Plan) -> str:
    chosen = [(e.name, e.rank, e.storage, e.weights) for e in plan.entries]
    return hashlib.sha256(json.dumps(chosen).encode()).hexdigest()
