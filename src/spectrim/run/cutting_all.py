"""Which way a run goes: survey or not, ranks by which rule, and which pass cuts the targets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from spectrim.allocate.checking import check_plan
from spectrim.allocate.curve import Curve, shape_curves
from spectrim.allocate.forms import AUTO, RESIDUAL
from spectrim.allocate.plan import Plan
from spectrim.allocate.rules import NATS, RULES
from spectrim.allocate.yardstick import sentence, yardstick, yardsticks_for
from spectrim.errors import RecipeError
from spectrim.linalg.exact_rank import exact_rank
from spectrim.model.weights import get_module, read_weight
from spectrim.recipe import ProjectedGradientRefinement, Recipe
from spectrim.run.cut.from_survey import cut_from_survey, holds
from spectrim.run.cut.one_shot import cut_one_shot
from spectrim.run.cut.sequential import cut_sequentially
from spectrim.run.cut.zero_sum import cut_in_stages
from spectrim.run.job import Job
from spectrim.run.parts.passing import CUT
from spectrim.run.planning import make_plan
from spectrim.run.survey.backward import output_moments
from spectrim.run.survey.families import measured_scale
from spectrim.run.survey.survey import make_survey, surveyed_choice
from spectrim.storage.survey_file import held_ranks
from spectrim.storage.survey_record import Survey


@dataclass
class Choice:
    """What is decided before anything is cut.

    Attributes:
        plan: rank per target.
        survey: what the plan was made from, or what the user brought; may be None.
        given: whether the plan is the user's.
    """

    plan: Plan
    survey: Survey | None
    given: bool

    def give_survey(self) -> Survey | None:
        """The survey, whose factors are let go of here."""
        survey, self.survey = self.survey, None
        return survey


def choose(job: Job, *, plan: Plan | None = None, survey: Survey | None = None) -> Choice:
    """Ranks for every target; surveys the model if the rule needs it and nobody has done so.

    Raises:
        InputError: the survey lacks what the rule needs.
        BudgetError: the keep is out of reach, or the plan is for another model.
    """
    recipe = job.recipe
    if plan is None and survey is None and RULES[recipe.allocate.rule].surveys:
        # A sequential flow makes factors anew: all that it takes from a survey are the ranks.
        # Factors as well where families of forms are compared.
        wanted = recipe.flow != "sequential" or recipe.storage.weights == AUTO
        wanted |= recipe.storage.kind == RESIDUAL
        survey = make_survey(job, vectors=wanted)
        job.log.notes.extend(survey.notes)
    made = plan or make_plan(
        recipe,
        dtype_bytes=job.dtype_bytes,
        curves=_curves(job) if survey is None else None,
        survey=survey,
        scale=measured_scale(job, survey) if mixes(job, survey) and survey else None,
    )
    cut_from = survey is not None and recipe.flow == "one-shot" and _same_objective(recipe, survey)
    made = check_plan(
        made,
        job.anatomy,
        dtype_bytes=job.dtype_bytes,
        held=held_ranks(survey) if plan is not None and survey is not None and cut_from else None,
    )
    if survey is not None and recipe.flow == "sequential":
        survey = replace(survey, factors=None)  # it gave the ranks; factors are made anew
    if survey is not None and _can_be_held_against_rounding(survey, made, job.dtype_bytes):
        job.log.notes.append(sentence(yardstick(survey.curves, made, job.dtype_bytes), made))
    return Choice(made, survey, given=plan is not None)


def _same_objective(recipe: Recipe, survey: Survey | None) -> bool:
    """Whether the survey's components are those that the recipe would make."""
    return survey is not None and surveyed_choice(recipe.decompose) == recipe.decompose


def _can_be_held_against_rounding(survey: Survey, plan: Plan, dtype_bytes: int) -> bool:
    """Whether rounding was judged, or is out of reach of the plan's bytes."""
    if plan.unit != NATS:
        return False
    known = all(curve.rounding for curve in survey.curves)
    return known or not yardsticks_for(survey.curves, plan.achieved_keep, dtype_bytes)


def _curves(job: Job) -> list[Curve]:
    """The targets' shapes, and the ranks of those that have less than full rank."""
    curves = {c.name: c for c in shape_curves(job.anatomy)}
    for block in job.anatomy.blocks:
        with job.keeper.at_hand(block):
            for name in (t.name for t in block.targets):
                rank = exact_rank(read_weight(get_module(job.model, name)), name=name)
                curves[name] = replace(curves[name], lossless=rank)
    return list(curves.values())


def mixes(job: Job, survey: Survey | None) -> bool:
    """Whether the plan weighs cutting against rounding, with numbers for both."""
    wanted = job.recipe.storage.weights == AUTO and RULES[job.recipe.allocate.rule].weighs_forms
    return wanted and survey is not None and all(c.rounding for c in survey.curves)


def cut_targets(job: Job, choice: Choice) -> Plan:
    """Cut all targets in place, by the recipe's flow; returns the plan that was carried out.

    A one-shot flow cuts from the survey's decompositions where it has them for this objective.
    """
    recipe, plan = job.recipe, choice.plan
    same = _same_objective(recipe, choice.survey)
    step = recipe.first(ProjectedGradientRefinement)
    corrected = [e.name for e in plan.entries if e.corrected]
    if corrected and recipe.flow == "one-shot":
        output_moments(job)  # of the original network, for what is stored at the end
    if step is not None and step.stages > 1:
        if corrected:
            raise RecipeError(
                f"the plan stores {corrected[0]} as a residual, and the recipe {recipe.name!r} "
                "cuts in stages, which hold ranks alone; use a recipe without stages"
            )
        first = choice.give_survey if same else lambda: None
        return cut_in_stages(job, step, plan=plan if choice.given else None, first=first)
    survey = choice.survey
    finished = job.keeper.all_finished(CUT, job.anatomy.blocks)
    if recipe.flow == "sequential":
        cut_sequentially(job, plan, {} if finished else output_moments(job))
    elif survey is not None and same and holds(survey, plan.cuts):
        cut_from_survey(job, plan.cuts, survey)
    else:
        cut_one_shot(job, plan, {} if finished else output_moments(job))
    return plan
