"""One pass over the original network: every target is the optimum of its own inputs."""

import copy

import pytest
import torch

from architectures import tiny, windows
from jobs import logits, make_job, same_state, uniform_plan
from spectrim.model.capture import capture_inputs
from spectrim.model.weights import get_module, read_weight
from spectrim.run.cut.one_shot import cut_one_shot


def optimal(M, k):
    """The best rank-k approximation of M."""
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return U[:, :k] * s[:k] @ Vh[:k]


def inputs_of(model, job):
    """Group key -> inputs (in, tokens) of whole forward passes."""
    seen = {}
    for block in job.anatomy.blocks:
        with capture_inputs(
            get_module(model, block.name), block.groups, lambda g, x: seen.update({g.key: x.T})
        ):
            logits(model, job.ids)
    return seen


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_whitened_is_the_best_output_at_its_rank(name):
    job = make_job(name, flow="one-shot")
    original, plan = copy.deepcopy(job.model), uniform_plan(job)
    cut_one_shot(job, plan)
    inputs = inputs_of(original, job)
    for group in job.anatomy.groups():
        X = inputs[group.key]
        for target in group.targets:
            output = read_weight(get_module(original, target.name)) @ X
            found = get_module(job.model, target.name).dense_weight() @ X
            best = optimal(output, plan[target.name].rank)
            assert torch.dist(found, best) < 1e-7 * output.norm()
            error = float(torch.dist(best, output).square() / output.square().sum())
            facts = job.log.targets[target.name]
            assert facts["predicted_error"] == pytest.approx(error, rel=1e-6)
            assert facts["measured_error"] == pytest.approx(error, rel=1e-6)


def test_plain_needs_no_windows():
    job = make_job(flow="one-shot", decompose={"objective": "plain"})
    job.windows = None
    original, plan = copy.deepcopy(job.model), uniform_plan(job)
    cut_one_shot(job, plan)
    for target in job.anatomy.targets:
        W = read_weight(get_module(original, target.name))
        found = get_module(job.model, target.name).dense_weight()
        torch.testing.assert_close(found, optimal(W, plan[target.name].rank))


def test_activation_is_the_best_scaled_weight():
    job = make_job(flow="one-shot", decompose={"objective": "activation", "alpha": 0.5})
    original, plan = copy.deepcopy(job.model), uniform_plan(job)
    cut_one_shot(job, plan)
    inputs = inputs_of(original, job)
    for group in job.anatomy.groups():
        scale = inputs[group.key].abs().mean(1).sqrt()
        for target in group.targets:
            W = read_weight(get_module(original, target.name))
            found = get_module(job.model, target.name).dense_weight()
            best = optimal(W * scale, plan[target.name].rank)
            torch.testing.assert_close(found * scale, best, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("objective", ["plain", "whitened"])
def test_batches_and_disk_do_not_matter(tmp_path, objective):
    recipe = {"flow": "one-shot", "decompose": {"objective": objective}}
    one = make_job(**recipe)
    other = make_job(**recipe, calibration={"batch": 5}, offload_streams=tmp_path)
    for job in (one, other):
        cut_one_shot(job, uniform_plan(job))
    fresh = windows(3, seed=9)
    torch.testing.assert_close(
        logits(one.model, fresh), logits(other.model, fresh), rtol=1e-8, atol=1e-8
    )


def test_what_is_no_target_and_biases_stay():
    job = make_job("gpt2", flow="one-shot", dtype=torch.float32)
    before, _ = tiny("gpt2")
    cut_one_shot(job, uniform_plan(job))
    after = job.model.state_dict()
    for name, value in before.state_dict().items():
        if name in after:
            assert torch.equal(after[name], value)
    for target in job.anatomy.targets:
        bias = get_module(before, target.name).bias
        assert torch.equal(get_module(job.model, target.name).bias, bias)


def test_dense_targets_stay_as_they_are():
    job = make_job(flow="one-shot", keep=1.0)
    before = copy.deepcopy(job.model)
    cut_one_shot(job, uniform_plan(job))
    assert same_state(before, job.model)
