"""From a recipe to ranks: which statistics its rule needs, and the plan once they are known.

Planning from a saved survey takes about a second, so nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spectrim.allocate.budget import (
    Shape,
    budget_bytes,
    components,
    keep_for_size,
    layer_bytes,
)
from spectrim.allocate.curve import Curve
from spectrim.allocate.forms import AUTO, Form, dense_forms
from spectrim.allocate.ladder import Limits, ladders_for, smallest_keep
from spectrim.allocate.plan import Plan, PlanEntry
from spectrim.allocate.rules import RULES, allocate
from spectrim.allocate.sensitivity import CANDIDATES, TABLE, Table
from spectrim.allocate.yardstick import YARDSTICKS, yardsticks_for
from spectrim.errors import BudgetError, InputError
from spectrim.recipe import Allocation, Recipe, validated
from spectrim.run.survey.pinning import own_storages, plan_around

if TYPE_CHECKING:
    from spectrim.model.anatomy import Anatomy
    from spectrim.storage.survey_record import Survey

__all__ = [
    "candidate_ranks",
    "check_plan",
    "judged_forms",
    "keep_of_size",
    "largest_rank",
    "make_plan",
    "needed_scores",
    "plan_from_survey",
    "plan_limits",
    "shape_curves",
]


def shape_curves(anatomy: Anatomy) -> list[Curve]:
    """What a rule that needs no spectra has to know of the targets."""
    return [
        Curve(t.name, t.block, t.projection, Shape(t.out_features, t.in_features, t.bias))
        for t in anatomy.targets
    ]


def plan_limits(recipe: Recipe, dtype_bytes: int) -> Limits:
    """What the recipe allows a plan to contain."""
    return Limits(
        dtype_bytes=dtype_bytes,
        storage=recipe.storage.kind,
        weights=recipe.storage.weights,
        floor=recipe.allocate.floor,
        multiple=recipe.allocate.multiple,
    )


def judged_forms(
    limits: Limits, curves: Sequence[Curve], keep: float | None = None
) -> tuple[Form, ...]:
    """The forms whose rounding a survey measures: what a plan may choose, and yardsticks.

    Args:
        limits: of the plans to come.
        curves: the targets' shapes.
        keep: where it is the only one, None for plans of any size.
    """
    if limits.weights == AUTO:
        return (*limits.forms, *dense_forms(AUTO))
    return YARDSTICKS if keep is None else yardsticks_for(curves, keep, limits.dtype_bytes)


def needed_scores(choice: Allocation) -> frozenset[str]:
    """What the survey must hold besides spectra for this rule; `table` for measured sensitivity."""
    return RULES[choice.rule].scores(choice.score)


def largest_rank(shape: Shape, limits: Limits) -> int:
    """Largest rank that a plan can give a target of this shape; at least 1."""
    ladder = ladders_for([Curve("target", 0, "target", shape)], limits)[0]
    return int(ladder.ranks[-1]) if ladder.ranks.size else 1


def candidate_ranks(curve: Curve, limits: Limits) -> dict[float, int]:
    """ASVD's candidate keeps of one target with the ranks that they allow."""
    ladder = ladders_for([curve], limits)[0]
    levels = {
        keep: ladder.level_within(budget_bytes(keep, ladder.dense_bytes)) for keep in CANDIDATES
    }
    return {keep: int(ladder.ranks[i]) for keep, i in levels.items() if 0 <= i < ladder.top}


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
    limits = plan_limits(recipe, dtype_bytes)
    known = {
        **choice.model_dump(),
        "scale": scale,
        "sign_stability": None if survey is None else survey.sign_stability,
    }

    def by_rule(some: Sequence[Curve], keep: float) -> Plan:
        options = {**known, "table": _of_targets(table, some)}
        return allocate(some, choice.rule, keep=keep, limits=limits, options=options)

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
    size: int | None = None,
    rule: str | None = None,
    score: str | None = None,
    floor: float | None = None,
    multiple: int | None = None,
) -> Plan:
    """A plan for any size, without the model.

    Args:
        survey: as loaded.
        keep: fraction of the target bytes; the recipe's by default.
        size: bytes of the whole checkpoint, instead of keep.
        rule: allocation rule; the recipe's by default.
        score: what knapsack minimises; by default the recipe's, or the best that is there.
        floor: least rank as a share of break-even.
        multiple: ranks are multiples of this.

    Raises:
        InputError: see `make_plan`.
        BudgetError: keep and size together, or out of reach.
    """
    if keep is not None and size is not None:
        raise BudgetError("keep and size exclude each other; give one")
    recipe = validated(Recipe, survey.recipe, source=f"the survey of {survey.model_name}")
    chosen = {
        k: v
        for k, v in {"rule": rule, "score": score, "floor": floor, "multiple": multiple}.items()
        if v is not None
    }
    if rule == "knapsack" and score is None and recipe.allocate.rule != "knapsack":
        chosen["score"] = best_score(survey)
    changes: dict[str, Any] = {"allocate": chosen}
    if keep is not None:
        changes["keep"] = keep
    recipe = recipe.with_changes(**changes)
    if size is not None:
        reachable = keep_of_size(
            size, recipe, survey.curves, survey.other_bytes, survey.dtype_bytes
        )
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


def check_plan(
    plan: Plan, anatomy: Anatomy, *, dtype_bytes: int = 2, held: Mapping[str, int] | None = None
) -> Plan:
    """A plan that somebody brought, as this model can carry it out; its bytes are recounted.

    Args:
        plan: from a file, which people edit, or from a survey.
        anatomy: of the model.
        dtype_bytes: of the checkpoint's dtype.
        held: components per target, where they come from a survey.

    Raises:
        BudgetError: it names other targets, or ranks that a target or the survey does not have;
            names the target.
    """
    planned, found = {e.name for e in plan.entries}, {t.name for t in anatomy.targets}
    if planned != found:
        odd = sorted(planned ^ found)
        raise BudgetError(
            f"the plan is for another model: {len(odd)} targets do not match, {odd[0]!r} first"
        )
    shapes = {c.name: c.shape for c in shape_curves(anatomy)}
    entries = tuple(
        _settled(entry, shapes[entry.name], dtype_bytes, (held or {}).get(entry.name))
        for entry in plan.entries
    )
    changed = [a.name for a, b in zip(plan.entries, entries, strict=True) if a.bytes != b.bytes]
    if not changed:
        return plan
    note = (
        f"the plan's bytes were recounted: {len(changed)} of {len(entries)} targets take others "
        f"than it says, {changed[0]} first"
    )
    return replace(plan, entries=entries, notes=(*plan.notes, note))


def _settled(entry: PlanEntry, shape: Shape, dtype_bytes: int, held: int | None) -> PlanEntry:
    """One target's entry with its true bytes."""
    name, rank, sizes = entry.name, entry.rank, f"{shape.out_features} x {shape.in_features}"
    dense = layer_bytes(shape, rank=None, storage="dense", dtype_bytes=dtype_bytes)
    if entry.dense_bytes != dense:
        raise BudgetError(
            f"the plan is for another model, dtype or shape: it counts {entry.dense_bytes} bytes "
            f"for the dense {name}, which is {sizes} and takes {dense}"
        )
    if rank is not None and not 1 <= rank <= components(shape):
        raise BudgetError(
            f"the plan gives {name} rank {rank}; its matrix is {sizes} and has ranks from 1 to "
            f"{components(shape)}"
        )
    if rank is not None and held is not None and rank > held:
        raise BudgetError(
            f"the plan gives {name} rank {rank}; the survey holds {held} components of it"
        )
    counted = layer_bytes(
        shape, rank=rank, storage=entry.storage, weights=entry.weights, dtype_bytes=dtype_bytes
    )
    return replace(entry, bytes=counted)
