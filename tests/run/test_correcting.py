"""Losses corrected by what the network says of one target at a time, and plans from them."""

from statistics import median

import pytest

from jobs import logits, make_job
from spectrim.allocate.curve import loss_by_rank
from spectrim.errors import InputError
from spectrim.model.weights import get_module, read_weight, write_weight
from spectrim.run.cutting_all import choose
from spectrim.run.out_of_core import check_out_of_core
from spectrim.run.planning import make_plan
from spectrim.run.survey.correcting import MOST, corrected_survey
from spectrim.run.survey.survey import make_survey

RULE = {"rule": "knapsack", "score": "kfac", "probe_windows": 4}


def job_for(**changes):
    return make_job(
        "llama",
        keep=0.6,
        flow="one-shot",
        decompose={"objective": "kfac", "shrink_in": 0.1, "shrink_out": 0.1},
        allocate=RULE | changes,
    )


@pytest.fixture(scope="module")
def found():
    job = job_for()
    survey = make_survey(job)
    plan = make_plan(job.recipe, dtype_bytes=8, survey=survey)
    return job, survey, plan, corrected_survey(job, survey, plan)


def divergence(job, survey, name, rank):
    """KL of the network with one weight replaced, by whole forwards on the probed windows."""
    module = get_module(job.model, name)
    ids, weight = job.ids[:4], read_weight(module).clone()
    before = logits(job.model, ids).log_softmax(-1)
    up, down = survey.factors[name].cut(rank)
    write_weight(module, up.double() @ down.double())
    after = logits(job.model, ids).log_softmax(-1)
    write_weight(module, weight)
    return float((before.exp() * (before - after)).sum()) / ids.numel()


def test_corrected_curves_pass_through_what_is_measured(found):
    job, survey, plan, corrected = found
    predicted = {c.name: loss_by_rank(c, "kfac") for c in survey.curves_for("kfac")}
    planned = [e for e in plan.entries if e.rank is not None]
    assert planned
    for entry in planned:
        measured = divergence(job, survey, entry.name, entry.rank)
        facts = job.log.targets[entry.name]
        assert facts["measured_loss"] == pytest.approx(measured, rel=1e-4)
        assert facts["predicted_loss"] == pytest.approx(predicted[entry.name][entry.rank])
        assert 1 / MOST < measured / facts["predicted_loss"] < MOST
        curve = corrected.losses["kfac"][entry.name]
        assert curve[entry.rank] == pytest.approx(measured, rel=1e-4)
        factor = curve[entry.rank] / predicted[entry.name][entry.rank]
        assert curve == pytest.approx(factor * predicted[entry.name])


def test_targets_without_a_measurement_take_the_median_of_their_projection(found):
    job, survey, plan, _ = found
    whole = plan.entries[0].name
    curves = {c.name: c for c in survey.curves}
    entries = tuple(
        e if e.name != whole else type(e)(**{**vars(e), "rank": None, "loss": 0.0})
        for e in plan.entries
    )
    corrected = corrected_survey(job, survey, type(plan)(entries, plan.keep, plan.rule))
    factors = {
        n: float(corrected.losses["kfac"][n][1] / loss_by_rank(c, "kfac")[1])
        for n, c in ((c.name, c) for c in survey.curves_for("kfac"))
    }
    alike = [
        factors[e.name]
        for e in entries
        if e.rank is not None and curves[e.name].projection == curves[whole].projection
    ]
    assert factors[whole] == pytest.approx(median(alike))


def test_a_run_plans_with_corrected_losses_and_says_so(found):
    _, _, plan, corrected = found
    job = job_for()
    chosen = choose(job).plan
    again = make_plan(job.recipe, dtype_bytes=job.dtype_bytes, survey=corrected)
    assert [e.rank for e in chosen.entries] == [e.rank for e in again.entries]
    assert any("measured on 4 windows" in note for note in job.log.notes)
    without = choose(job_for(probe_windows=0)).plan
    assert [e.rank for e in without.entries] == [e.rank for e in plan.entries]


def test_probing_is_refused_out_of_core():
    with pytest.raises(InputError, match="once for every target"):
        check_out_of_core(job_for().recipe, own_text=True)
    check_out_of_core(job_for().recipe, planned=True, own_text=True)
    check_out_of_core(job_for(probe_windows=0).recipe, own_text=True)
