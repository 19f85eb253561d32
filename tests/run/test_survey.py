"""The survey's numbers against dense algebra, autograd, and models that are really cut."""

import copy
import math

import pytest
import torch

from architectures import windows
from jobs import logits, make_job, same_state, uniform_plan
from priors import alike, mixed
from spectrim.allocate.budget import Shape, break_even
from spectrim.allocate.curve import loss_by_rank
from spectrim.decompose import OBJECTIVES
from spectrim.errors import ArtifactError
from spectrim.model.weights import get_module, read_weight, write_weight
from spectrim.moments.gradients import gradient_pass
from spectrim.run.cut.from_survey import cut_from_survey, holds
from spectrim.run.cut.one_shot import cut_one_shot
from spectrim.run.loading import load_model
from spectrim.run.planning import make_plan
from spectrim.run.survey.survey import make_survey
from spectrim.run.survey.survey_key import survey_key
from spectrim.run.survey.surveying import survey_model

STEP = 0.02
"""Of finite differences: transformers' norms compute in fp32, which smaller steps would show."""


def job_for(objective="whitened", *, windows=6, **allocate):
    return make_job(
        count=windows,
        flow="one-shot",
        decompose={"objective": objective, "clip": None},
        allocate={"gradient_windows": windows, **allocate},
        calibration={"batch": 4},
    )


def mean_loss(model, ids):
    flat = logits(model, ids)[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten()))


def all_scores(job):
    return make_survey(job, scores=("first_order", "second_order", "kfac", "measured"))


def test_the_model_is_left_as_it_was():
    job = job_for()
    before = copy.deepcopy(job.model)
    all_scores(job)
    assert same_state(before, job.model)


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_can_be_surveyed_planned_and_cut(objective):
    job = job_for(objective)
    survey = make_survey(job, scores=("first_order",))
    plan = uniform_plan(job)
    assert holds(survey, plan)
    cut_from_survey(job, plan, survey)
    assert torch.isfinite(logits(job.model, job.ids)).all()
    on_shifted_inputs = "shifted" in OBJECTIVES[objective].needs
    assert any("nothing is shifted" in note for note in survey.notes) == on_shifted_inputs


@pytest.mark.parametrize("objective", ["plain", "activation", "whitened"])
def test_cutting_from_the_survey_is_cutting_in_one_shot(objective):
    job = job_for(objective)
    other = job_for(objective)
    plan = uniform_plan(job)
    survey = make_survey(job)
    cut_from_survey(job, plan, survey)
    cut_one_shot(other, plan)
    found, expected = logits(job.model, job.ids), logits(other.model, job.ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name, facts in other.log.targets.items():
        assert job.log.targets[name]["predicted_error"] == pytest.approx(
            facts["predicted_error"], rel=1e-6, abs=1e-12
        )


def test_factors_are_held_as_far_as_a_plan_can_use_them():
    job = job_for()
    survey = make_survey(job, scores=("first_order",))
    for curve in survey.curves:
        assert curve.rank == min(curve.shape.out_features, curve.shape.in_features)
        assert survey.factors[curve.name].rank == break_even(curve.shape)
        assert survey.factors[curve.name].up.dtype == torch.float32
    assert break_even(Shape(40, 40)) == 19


def test_first_order_scores_are_derivatives_of_the_loss():
    job = job_for()
    survey = make_survey(job, scores=("first_order",))
    for target in job.anatomy.targets[1:12:5]:
        module = get_module(job.model, target.name)
        W = read_weight(module).clone()
        up, down = (f.double() for f in survey.factors[target.name].cut(8))
        curve = next(c for c in survey.curves if c.name == target.name)
        for i in (0, 3, 7):
            component = up[:, i : i + 1] @ down[i : i + 1]
            losses = []
            for sign in (1, -1):
                write_weight(module, W - sign * STEP * component)
                losses.append(mean_loss(job.model, job.ids))
            write_weight(module, W)
            derivative = (losses[0] - losses[1]) / (2 * STEP)
            assert curve.score[i] == pytest.approx(derivative, rel=0.01, abs=3e-6)


def test_second_order_losses_are_half_the_mean_squared_change():
    job = job_for()
    survey = make_survey(job, scores=("second_order",))
    target = job.anatomy.targets[5]
    curve = next(c for c in survey.curves_for("second_order") if c.name == target.name)
    rank = survey.factors[target.name].rank
    up, down = (f.double() for f in survey.factors[target.name].cut(rank))
    squares = torch.zeros(rank, dtype=torch.float64)
    for i in range(len(job.ids)):
        one = gradient_pass(job.model, job.anatomy, job.ids[i : i + 1], needs={"gradient"})
        change = ((up.T @ one.outputs[target.name].gradient) * down).sum(1)
        squares += change.square() / len(job.ids)
    tokens = job.ids.shape[1] - 1
    found = torch.as_tensor(curve.loss)
    torch.testing.assert_close(
        found[:rank] - found[1 : rank + 1], squares / tokens / 2, rtol=1e-5, atol=1e-12
    )
    assert found[-1] == 0 and (found.diff() <= 0).all()


@pytest.mark.parametrize("objective", ["whitened", "kfac"])
def test_kfac_losses_are_the_double_sided_objective_at_every_rank(objective):
    """`½ tr(Δᵀ Ḡ Δ C̄)` by dense algebra."""
    job = job_for(objective)
    job.recipe = job.recipe.with_changes(decompose={"shrink_out": 0.0})
    gathered = gradient_pass(job.model, job.anatomy, job.ids, needs={"G"}, input_needs={"C"})
    survey = make_survey(job, scores=("kfac",))
    group = list(job.anatomy.groups())[2]
    target = group.targets[0]
    output, moments = gathered.outputs[target.name], gathered.inputs[target.name]
    G, C = output.G / output.tokens, moments.C / moments.tokens
    curve = next(c for c in survey.curves_for("kfac") if c.name == target.name)
    losses = loss_by_rank(curve, "kfac")
    W = read_weight(get_module(job.model, target.name))
    for k in (1, 5, 15):
        up, down = survey.factors[target.name].cut(k)
        D = W - up.double() @ down.double()
        expected = 0.5 * float((D.T @ G @ D @ C).trace())
        assert losses[k] == pytest.approx(expected, rel=1e-4)


def test_measured_references_are_divergences_of_models_with_one_target_cut():
    job = job_for(windows=10)
    survey = make_survey(job, scores=("measured",))
    ids = job.ids[:8]
    log_p = logits(job.model, ids).log_softmax(-1)
    for curve in survey.curves[::6]:
        rank, divergence = curve.reference
        assert rank == max(1, round(break_even(curve.shape) * 0.1))
        changed = copy.deepcopy(job.model)
        up, down = survey.factors[curve.name].cut(rank)
        write_weight(get_module(changed, curve.name), up.double() @ down.double())
        log_q = logits(changed, ids).log_softmax(-1)
        expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        assert divergence == pytest.approx(expected, rel=1e-3)


def test_sensitivities_are_perplexities_of_models_with_one_target_cut():
    job = job_for(windows=4, rule="sensitivity", score="measured")
    survey = make_survey(job)
    assert len(survey.table) == 6 * len(job.anatomy.targets)
    curve = survey.curves[3]
    for keep in (0.4, 0.9):
        rank = int(keep * 40 * curve.shape.out_features / (40 + curve.shape.out_features))
        changed = copy.deepcopy(job.model)
        up, down = survey.factors[curve.name].cut(rank)
        write_weight(get_module(changed, curve.name), up.double() @ down.double())
        expected = math.exp(mean_loss(changed, job.ids))
        assert survey.table[curve.name, keep] == pytest.approx(expected, rel=1e-5)
    assert any("84 evaluations of 44 tokens" in note for note in job.log.notes)


def test_one_backward_pass_serves_gradient_objectives():
    job = job_for("kfac")
    survey = make_survey(job, scores=())
    gathered = gradient_pass(job.model, job.anatomy, job.ids, needs={"G"}, input_needs={"C"})
    assert survey.facts["seconds"].keys() >= {"survey"}
    target = job.anatomy.targets[0]
    curve = survey.curves[0]
    output, moments = gathered.outputs[target.name], gathered.inputs[target.name]
    G = output.G / output.tokens
    W = read_weight(get_module(job.model, target.name)).double()
    G = mixed(G, 0.3, alike(W)[0])
    expected = 0.5 * float((W.T @ G @ W @ moments.C).trace()) / moments.tokens
    assert curve.total == pytest.approx(expected, rel=1e-6)


def test_a_kept_survey_has_the_key_of_its_model_text_and_objective():
    job = job_for()
    loaded = load_model(job.model)
    survey = survey_model(loaded, job.recipe, text=job.ids)
    assert survey.scores == ("energy", "first_order", "second_order")
    survey.check(survey_key(loaded, job.recipe, job.windows))
    other = job.recipe.with_changes(
        keep=0.3, allocate={"rule": "knapsack"}, decompose={"shrink_in": 0.1}
    )
    key = survey_key(loaded, other, job.windows)
    assert survey.key.differences(key) == ["decompose.shrink_in"]
    with torch.no_grad():
        next(loaded.model.parameters()).mul_(1.01)
    with pytest.raises(ArtifactError, match="model"):
        survey.check(survey_key(loaded, job.recipe, job.windows))


def test_other_windows_have_another_key():
    job = job_for()
    loaded = load_model(job.model)
    one = survey_model(loaded, job.recipe, text=job.ids, scores=())
    two = survey_model(loaded, job.recipe, text=windows(6, seed=9), scores=())
    assert one.key.differences(two.key) == ["windows"]


@pytest.mark.parametrize("objective", ["whitened", "kfac"])
def test_ranks_need_no_vectors(objective):
    """A survey of spectra alone gives the plan that one with factors gives."""
    score = {"whitened": "energy", "kfac": "kfac"}[objective]
    job = job_for(objective, rule="knapsack", score=score)
    whole, spectra = make_survey(job), make_survey(job, vectors=False)
    assert spectra.factors is None
    plans = [make_plan(job.recipe, dtype_bytes=4, survey=survey) for survey in (whole, spectra)]
    assert plans[0].entries and [e.rank for e in plans[0].entries] == [
        e.rank for e in plans[1].entries
    ]
