"""From a recipe to ranks: which statistics its rule needs, and the plan once they are known.

Planning from a saved survey takes about a second, so nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spectrim.allocate.budget import keep_for_size, layer_bytes
from spectrim.allocate.curve import Curve
from spectrim.allocate.experts import equal_in_blocks
from spectrim.allocate.ladder import Limits, smallest_keep
from spectrim.allocate.pinning import own_storages, plan_around
from spectrim.allocate.plan import Plan
from spectrim.allocate.rules import RULES, allocate
from spectrim.allocate.sensitivity import TABLE, Table
from spectrim.errors import BudgetError, InputError, RecipeError
from spectrim.recipe import Recipe, validated
from spectrim.sizes import parse_size

if TYPE_CHECKING:
    from spectrim.storage.survey_record import Survey


def plan_limits(recipe: Recipe, dtype_bytes: int) -> Limits:
    """What the recipe allows a plan to contain."""
    return Limits(
        dtype_bytes=dtype_bytes,
        storage=recipe.storage.kind,
        weights=recipe.storage.weights,
        floor=recipe.allocate.floor,
        multiple=recipe.allocate.multiple,
        alike=recipe.storage.alike,
        formats=recipe.storage.formats,
    )


def make_plan(
    recipe: Recipe,
    *,
    dtype_bytes: int,
    curves: Sequence[Curve] | None = None,
    survey: Survey | None = None,
    scale: Mapping[str, float] | None = None,
) -> Plan:
    """Ranks by the recipe's rule, from a survey or, for the uniform rule, from shapes alone.

    Args:
        recipe: resolved, with its keep.
        dtype_bytes: of the checkpoint's dtype.
        curves: the targets' shapes, where there is no survey.
        survey: spectra and scores; every rule but `uniform` needs one.
        scale: for the knapsack, what predicted losses of cutting and rounding are worth.

    Raises:
        InputError: the survey lacks what the rule needs, or there is none.
        BudgetError: the keep is below what the limits allow.
    """
    choice = recipe.allocate
    rule, table = RULES[choice.rule], None
    if survey is not None:
        # Zero-sum reads the signed scores, which every curve carries; the others take one score.
        needed = sorted(rule.scores(choice.score) - {TABLE})
        curves = survey.curves_for(needed[0] if needed else "energy")  # type: ignore[arg-type]
        table = (survey.table or None) if choice.score == "measured" else None
    elif rule.surveys:
        raise InputError(f"the rule {choice.rule!r} needs a survey of the model")
    if choice.experts == "equal" and choice.rule in ("zero_sum", "sensitivity"):
        raise InputError(
            f"the rule {choice.rule!r} chooses component by component or target by target; equal "
            "ranks for the experts of a block go with uniform, loss_ratio and knapsack"
        )
    limits = plan_limits(recipe, dtype_bytes)
    known = {
        **choice.model_dump(),
        "scale": scale,
        "sign_stability": None if survey is None else survey.sign_stability,
    }

    def by_rule(some: Sequence[Curve], keep: float) -> Plan:
        options = {**known, "table": _of_targets(table, some)}

        def share(curves: Sequence[Curve]) -> Plan:
            return allocate(curves, choice.rule, keep=keep, limits=limits, options=options)

        return share(some) if choice.experts == "each" else equal_in_blocks(some, share)

    made = plan_around(
        own_storages(curves or [], recipe.targets.own),
        recipe.targets.own,
        keep=recipe.keep,
        limits=limits,
        score=choice.score if rule.weighs_forms else None,
        rule=by_rule,
    )
    unit = rule.unit(choice.score)
    return replace(made, unit=None if made.predicted_loss is None else unit)


def _of_targets(table: Table | None, curves: Sequence[Curve]) -> Table | None:
    """The part of a table of sensitivities that is about some targets."""
    if table is None:
        return None
    names = {curve.name for curve in curves}
    return {key: value for key, value in table.items() if key[0] in names}


def plan_from_survey(
    survey: Survey,
    *,
    keep: float | None = None,
    size: str | int | None = None,
    **rule: Any,
) -> Plan:
    """A plan for any size, without the model.

    Args:
        survey: as loaded.
        keep: fraction of the target bytes; the recipe's by default.
        size: bytes of the whole checkpoint, instead of keep.
        **rule: `rule`, `score`, `floor` and `multiple` in place of the recipe's; for a knapsack
            that the recipe does not ask for, the score is the best that is there.

    Raises:
        InputError: see `make_plan`.
        BudgetError: keep and size together, or out of reach.
    """
    if keep is not None and size is not None:
        raise BudgetError("keep and size exclude each other; give one")
    recipe = validated(Recipe, survey.recipe, source=f"the survey of {survey.model_name}")
    chosen = {name: value for name, value in rule.items() if value is not None}
    if chosen.get("rule") == "knapsack" != recipe.allocate.rule:
        chosen.setdefault("score", best_score(survey))
    changes: dict[str, Any] = {"allocate": chosen}
    if keep is not None:
        changes["keep"] = keep
    recipe = recipe.with_changes(**changes)
    if size is not None:
        other, itemsize = survey.other_bytes, survey.dtype_bytes
        reachable = keep_of_size(parse_size(size), recipe, survey.curves, other, itemsize)
        recipe = recipe.with_changes(keep=reachable)
    return make_plan(recipe, dtype_bytes=survey.dtype_bytes, survey=survey)


def best_score(survey: Survey) -> str:
    """The score to minimise where the user names none."""
    for score in ("kfac", "second_order", "measured", "first_order"):
        if score in survey.scores:
            return score
    return "energy"


def keep_of_size(
    size: int, recipe: Recipe, curves: Sequence[Curve], other_bytes: int, dtype_bytes: int
) -> float:
    """The keep at which the whole checkpoint has at most `size` bytes.

    Raises:
        BudgetError: no keep gives that size; names the possible ones.
    """
    dense = sum(
        layer_bytes(c.shape, rank=None, storage="dense", dtype_bytes=dtype_bytes) for c in curves
    )
    return keep_for_size(
        size,
        other_bytes=other_bytes,
        targets_dense_bytes=dense,
        smallest_keep=smallest_keep(curves, plan_limits(recipe, dtype_bytes)),
    )


def check_keep_reachable(recipe: Recipe, curves: Sequence[Curve], dtype_bytes: int) -> None:
    """Refuse a keep that no rule reaches, before anything is measured for it.

    Where integers, sizes of their own or learned components reach further than ranks, the plan
    says it.

    Raises:
        BudgetError: names the reachable range.
    """
    if recipe.flow == "learned" or recipe.targets.own or recipe.storage.weights != "native":
        return
    least = smallest_keep(curves, plan_limits(recipe, dtype_bytes))
    if recipe.keep < least:
        raise BudgetError(
            f"keep {recipe.keep} cannot be reached: with every target at its least rank the "
            f"{len(curves)} targets keep {math.ceil(least * 1e6) / 1e6:.6f} (a lower floor, a "
            "smaller multiple of ranks, or --weights int8 go below)"
        )


def check_own(recipe: Recipe) -> None:
    """Refuse sizes of their own where components are learned in one order for all targets.

    Raises:
        RecipeError: the flow does not plan.
    """
    if recipe.targets.own and recipe.flow == "learned":
        raise RecipeError(
            f"recipe {recipe.name!r} learns one order for all targets and gives none of them a "
            "keep, rank or storage of its own; protect targets with skip, or use another recipe"
        )
