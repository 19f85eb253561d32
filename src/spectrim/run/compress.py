"""The whole run: windows, anatomy, plan, the recipe's flow, storage, report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from spectrim.allocate.forms import Form
from spectrim.allocate.plan import Plan
from spectrim.distributed.team import Team
from spectrim.errors import InputError, RecipeError
from spectrim.model.onload import Onloader
from spectrim.model.outside import count_outside
from spectrim.model.weights import cast_parameters
from spectrim.recipe import Recipe
from spectrim.run.cutting_all import choose, cut_targets
from spectrim.run.experts import note_experts
from spectrim.run.job import Job
from spectrim.run.learned.learned import learn
from spectrim.run.loading import LoadedModel
from spectrim.run.opening import open_job, other_bytes, protected_bytes
from spectrim.run.options import RunOptions
from spectrim.run.planning import check_own
from spectrim.run.quality import measure_after, measure_before
from spectrim.run.reporting import Original, build_report
from spectrim.run.room import said
from spectrim.run.store.storing import check_storage, store
from spectrim.run.survey.survey_key import survey_key
from spectrim.run.texts import UserText
from spectrim.run.train.refining import check_steps
from spectrim.run.train.whole_network import carry_out, prepare
from spectrim.storage.elastic import Base, Elastic
from spectrim.storage.shared_work import Work
from spectrim.storage.survey_record import Survey


@dataclass
class Outcome:
    """A compressed model in memory and what is known about it.

    Attributes:
        model: compressed in place.
        tokenizer: the original's.
        plan: as carried out.
        recipe: resolved.
        report: JSON-ready.
        elastic: every size, where the recipe's training gives them all.
        onloader: reads the blocks of a model that is not in memory.
    """

    model: nn.Module
    tokenizer: Any
    plan: Plan
    recipe: Recipe
    report: dict[str, Any]
    elastic: Elastic | None = None
    onloader: Onloader | None = None


def _needs_windows(recipe: Recipe, survey: Survey | None) -> bool:
    if recipe.refine or recipe.learn is not None or recipe.flow != "one-shot":
        return True
    if survey is not None:
        return False
    return recipe.reads_text


def run_recipe(
    loaded: LoadedModel,
    recipe: Recipe,
    options: RunOptions = RunOptions(),
    *,
    text: UserText = None,
    size: int | None = None,
    plan: Plan | None = None,
    survey: Survey | None = None,
    work: Work | None = None,
) -> Outcome:
    """Compress a loaded model in place.

    A model that is not in memory comes back as a skeleton whose blocks lie in the work folder;
    whether the recipe can be run so was checked before it was loaded.

    Args:
        loaded: the model; its parameters are replaced.
        recipe: resolved, with its keep.
        options: how and where. Every process of a team ends with the compressed model, the
            leader's report has everything.
        text: the user's calibration text, None for the recipe's.
        size: bytes of the whole checkpoint to reach, in place of the recipe's keep.
        plan: ranks to use instead of the recipe's rule.
        survey: of this model: gives the ranks, and a one-shot flow its decompositions.
        work: where finished blocks, surveyed blocks and checkpoints of a learned flow are kept
            and found again.

    Raises:
        SpectrimError: anything that keeps the run from an honest result.
    """
    check_steps(recipe)
    check_storage(recipe)
    check_own(recipe)
    _check_learnable(recipe, options.team, brought=plan is not None or survey is not None)
    calibrate = _needs_windows(recipe, survey) or text is not None
    brought = {"plan": plan, "survey": survey}
    more = {"text": text, "size": size, "work": work, "brought": brought}
    job = open_job(loaded, recipe, options, calibrate=calibrate, **more)
    model, log, dtype = job.model, job.log, loaded.stored_dtype
    original = _original(loaded, job)
    if survey is not None:
        _check_survey(loaded, job, survey)
    before = None
    if options.measure and options.team.leads:
        with log.timed("measure"):
            before = measure_before(job, loaded, options.evaluation_text)
    elastic = None
    if recipe.flow == "learned":
        chosen, elastic = _learn(job, loaded, original, work)
    else:
        chosen = _decide_and_cut(job, plan, survey)
    chosen = store(job, chosen, dtype)
    cast_parameters(model, dtype)
    measured = None
    if before is not None:
        with log.timed("measure"):
            measured = measure_after(job, before, dtype)
    report = _report(original, job, chosen, measured, survey)
    return Outcome(model, loaded.tokenizer, chosen, job.recipe, report, elastic, loaded.onloader)


def _original(loaded: LoadedModel, job: Job) -> Original:
    """What the report says of the model, which has not been cut."""
    model, anatomy, dtype = job.model, job.anatomy, loaded.stored_dtype
    return Original(
        loaded.name,
        {t.name: (t.out_features, t.in_features) for t in anatomy.targets},
        other_bytes(model, anatomy, dtype),
        anatomy.left_alone,
        count_outside(model, anatomy).record(),
        protected_bytes(model, anatomy, dtype),
    )


def _report(
    original: Original,
    job: Job,
    plan: Plan,
    measured: dict[str, Any] | None,
    survey: Survey | None,
) -> dict[str, Any]:
    """What was done; what was calibrated on is the survey's where this run had no windows."""
    calibration = None if job.windows is None else job.windows.record()
    if job.windows is None and survey is not None:
        calibration = survey.facts.get("calibration")
    known = {"calibration": calibration, "measured": measured}
    report = build_report(original, job.recipe, plan, job.log, **known)
    report["environment"] |= {"processes": job.team.size, "passes": said(job.room)}
    report["predicted_memory_bytes"] = job.log.predicted
    return report


def _check_learnable(recipe: Recipe, team: Team, *, brought: bool) -> None:
    """Refuse what a recipe that learns its ranks cannot take up.

    Raises:
        RecipeError: several processes would not do as one does.
        InputError: ranks were brought.
    """
    if recipe.flow != "learned":
        return
    if team.size > 1:
        raise RecipeError(
            f"the recipe {recipe.name!r} trains gates on every component, which runs in one "
            f"process only, and {team.size} were started; start spectrim without torchrun"
        )
    if brought:
        raise InputError(f"recipe {recipe.name!r} learns its ranks: it takes no plan or survey")


def _decide_and_cut(job: Job, plan: Plan | None, survey: Survey | None) -> Plan:
    """One-shot and sequential flows: ranks first, then the cut, then what follows it."""
    choice = choose(job, plan=plan, survey=survey)
    chosen = choice.plan
    if any(Form(e.storage, e.weights) != Form("dense") for e in chosen.entries):
        steps = prepare(job)
        chosen = cut_targets(job, choice)
        note_experts(job.log)
        carry_out(job, steps)
    else:
        job.log.notes.append("every target stays dense at this keep: nothing was cut or refined")
    return chosen


def _learn(
    job: Job, loaded: LoadedModel, original: Original, work: Work | None
) -> tuple[Plan, Elastic | None]:
    """The learned flow: a training decides the ranks, and may give every size."""
    steps = prepare(job)
    base = Base(
        name=loaded.name,
        identity=loaded.identity(),
        dtype=str(loaded.stored_dtype).removeprefix("torch."),  # type: ignore[arg-type]
        other_bytes=original.other_bytes,
    )
    chosen, elastic = learn(job, base=base, work=None if work is None else work.path)
    carry_out(job, steps)
    return chosen, elastic


def _check_survey(loaded: LoadedModel, job: Job, survey: Survey) -> None:
    """Refuse a survey of another model; for a one-shot flow also of another objective or text."""
    key = survey_key(loaded, job.recipe, job.windows)
    ignored: set[str] = set()
    if job.windows is None:
        ignored = {"windows"}
    if job.recipe.flow != "one-shot":
        # Only ranks are taken, and those may come from any objective and text.
        ignored = {"windows", "tokenizer", *key.settings, *(survey.key or key).settings}
    survey.check(key, ignore=ignored)
