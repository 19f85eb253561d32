"""Compression by cost: survey once, plan, and for a loss measure it and correct the plan once.

Predicted losses have been off by factors from 0.6 to 8 (`docs/evaluation.md`), so the first plan is
only a trial: what it really loses on windows that the run did not read corrects the prediction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from spectrim.errors import InputError
from spectrim.recipe import Recipe
from spectrim.run.resolving import check_size, resolve_recipe
from spectrim.run.survey.by_cost import energy_plan, loss_plan, predicted_nats
from spectrim.run.word import among
from spectrim.run.words import RecipeWords, SavingWords
from spectrim.storage.survey_file import load_survey
from spectrim.storage.survey_record import Survey

LARGEST_CORRECTION = 10.0
"""Factor between predicted and measured loss that is believed."""

logger = logging.getLogger(__name__)


def compress_at_cost(
    compress: Callable[..., Any], survey: Callable[..., Survey], asked: dict[str, Any]
) -> Any:
    """Carry out `compress` for a cost in place of a size.

    Args:
        compress: of the interface.
        survey: of the interface.
        asked: all words of `compress` and its model, with `max_loss` or `energy`.

    Raises:
        BudgetError: more than one word for the size, or a cost that is none.
        InputError: what cannot be done by cost.
    """
    check_size(asked)
    _check_possible(asked)
    max_loss, energy = asked.pop("max_loss"), asked.pop("energy")
    recipe = resolve_recipe(
        asked["recipe"], **{k: v for k, v in among(asked, RecipeWords).items() if k != "keep"}
    )
    if recipe.flow == "learned":
        raise InputError(
            f"recipe {recipe.name!r} learns its ranks; make the artifact and resize it to a keep"
        )
    model, brought = asked.pop("model"), asked.pop("survey")
    if brought is None:
        given = among(asked, SavingWords) | {n: asked[n] for n in ("text", "window_length")}
        made = survey(model, **given | {"recipe": recipe, "output": None, "overwrite": False})
    else:
        made = brought if isinstance(brought, Survey) else load_survey(brought)
    if energy is not None:
        return _cut(compress, model, asked, recipe, made, energy_plan(recipe, made, energy))
    plan = loss_plan(recipe, made, max_loss)
    trial = {**asked, "output": None, "overwrite": False, "work": None, "measure": True}
    # Without the survey, so that the run reads windows and knows which are left to measure on.
    first = _cut(compress, model, trial, recipe, None, plan)
    predicted, measured = predicted_nats(plan, made), _measured(first)
    del first
    factor = _correction(predicted, measured)
    second = loss_plan(recipe, made, max_loss / factor)
    note = (
        f"asked for a loss of at most {max_loss:g} nats per token: keep {plan.achieved_keep:.4f} "
        f"was predicted to lose {predicted:.3g} and lost {measured:.3g}, so keep "
        f"{second.achieved_keep:.4f} with {predicted_nats(second, made) * factor:.3g} expected "
        "after that correction"
    )
    logger.info("%s", note)
    second = replace(second, notes=(*second.notes, note))
    result = _cut(compress, model, {**asked, "measure": True}, recipe, None, second)
    lost = _measured(result)
    if lost > max_loss:
        logger.warning(
            "the result loses %.3g nats per token, more than the %.3g that were asked for",
            *(lost, max_loss),
        )
    return result


def _check_possible(asked: dict[str, Any]) -> None:
    if asked["max_loss"] is not None and not isinstance(asked["model"], str | Path):
        raise InputError(
            "max_loss compresses twice and needs the model as a folder or hub name, not an object "
            "that the first time changes"
        )
    if asked["team"] is not None and asked["team"].size > 1:
        raise InputError("compression by cost runs in one process; start it without torchrun")


def _cut(
    compress: Callable[..., Any],
    model: Any,
    asked: dict[str, Any],
    recipe: Recipe,
    survey: Survey | None,
    plan: Any,
) -> Any:
    """Compress with a plan; the recipe has everything that its options said."""
    passed = {k: v for k, v in asked.items() if k not in among(asked, RecipeWords)}
    passed |= {"recipe": recipe, "plan": plan, "text": asked["text"]}
    if survey is not None and recipe.flow == "one-shot":
        passed["survey"] = survey
    return compress(model, **passed)


def _measured(result: Any) -> float:
    """Nats per token lost, on another text than the calibration's if there is one."""
    texts = (result.report["measured"] or {}).get("texts") or []
    if not texts:
        reason = (result.report["measured"] or {}).get("why_not")
        raise InputError(f"max_loss needs a measured loss, and there is none: {reason}")
    chosen = next((t for t in texts if t["kind"] == "other"), texts[0])
    return chosen["compressed"]["nll"] - chosen["dense"]["nll"]


def _correction(predicted: float, measured: float) -> float:
    """Measured over predicted loss, as far as it is believed."""
    if predicted <= 0:
        return 1.0
    return min(LARGEST_CORRECTION, max(1 / LARGEST_CORRECTION, measured / predicted))
