"""Plans by what they cost instead of by their size: a share of every spectrum, or a loss."""

from __future__ import annotations

import numpy as np

from spectrim.allocate.curve import Score, loss_by_rank, tail_energy
from spectrim.allocate.forms import rounded_loss
from spectrim.allocate.ladder import ladders_for, plan_from_levels, smallest_keep
from spectrim.allocate.pinning import own_storages
from spectrim.allocate.plan import Plan
from spectrim.errors import BudgetError, InputError
from spectrim.recipe import Recipe
from spectrim.run.planning import make_plan, plan_limits
from spectrim.storage.survey_record import Survey
from spectrim.tolerances import KEEP_STEPS

_IN_NATS: tuple[Score, ...] = ("kfac", "second_order", "measured", "first_order")
"""Scores that predict losses of the model, the best first."""


def energy_plan(recipe: Recipe, survey: Survey, energy: float) -> Plan:
    """The least rank of every target that keeps a share of its spectrum.

    Args:
        recipe: says storage, floor and multiples; its keep plays no part.
        survey: with the spectra of the recipe's own objective.
        energy: share in (0, 1] of what the objective measures that every target keeps.

    Returns:
        A plan whose `keep` is the one that it reaches.
    """
    limits = plan_limits(recipe, survey.dtype_bytes)
    ladders = ladders_for(own_storages(survey.curves, recipe.targets.own), limits)
    levels = []
    for ladder in ladders:
        tail = tail_energy(ladder.curve)
        enough = np.flatnonzero(tail[ladder.ranks] <= (1.0 - energy) * tail[0])
        levels.append(int(enough[0]) if enough.size else ladder.top)
    losses = [loss_by_rank(ladder.curve, "energy") for ladder in ladders]
    made = plan_from_levels(ladders, np.array(levels), keep=1.0, rule="energy", losses=losses)
    note = f"every target keeps {energy:g} of what its objective measures"
    unit = "relative squared errors, summed over targets"
    return Plan(made.entries, made.achieved_keep, "energy", (note,), unit)


def predicted_nats(plan: Plan, survey: Survey) -> float:
    """Loss of a plan by the best score that the survey holds, whatever rule made it, nats.

    What rounding adds is counted where the survey judged the form.

    Raises:
        InputError: the survey predicts no loss.
    """
    score: Score | None = next((score for score in _IN_NATS if score in survey.scores), None)
    if score is None:
        raise InputError(
            f"a survey with the scores {', '.join(survey.scores)} predicts no loss of the model; "
            f"one of {', '.join(_IN_NATS)} does"
        )
    total = 0.0
    for curve in survey.curves_for(score):
        entry = plan[curve.name]
        total += rounded_loss(curve, entry)
        if entry.components is not None:
            total += float(loss_by_rank(curve, score)[entry.components])
    return total


def loss_plan(recipe: Recipe, survey: Survey, loss: float) -> Plan:
    """The smallest plan of the recipe's rule whose predicted loss is at most `loss`.

    The keep is found by bisection, to one part in `KEEP_STEPS` of the reachable range.

    Args:
        recipe: its keep plays no part.
        survey: predicts losses in nats.
        loss: nats per token, more than 0.
    """
    limits = plan_limits(recipe, survey.dtype_bytes)
    least = smallest_keep(survey.curves, limits)

    def at(step: int) -> Plan:
        keep = least + (1.0 - least) * step / KEEP_STEPS
        return make_plan(
            recipe.with_changes(keep=min(1.0, keep)),
            dtype_bytes=survey.dtype_bytes,
            survey=survey,
        )

    low, high, found = 0, KEEP_STEPS, at(KEEP_STEPS)
    while low < high:
        middle = (low + high) // 2
        try:
            made = at(middle)
        except BudgetError:  # some targets have a size of their own, and take more than this
            low = middle + 1
            continue
        if predicted_nats(made, survey) <= loss:
            high, found = middle, made
        else:
            low = middle + 1
    return found
