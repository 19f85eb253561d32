"""ZS-SVD in stages against the same steps done by hand, and what must hold of any run."""

import copy

import pytest
import torch

from jobs import logits, make_job, same_state, uniform_plan
from spectrim.allocate.plan import Plan
from spectrim.model.weights import get_module, read_weight
from spectrim.recipe import ProjectedGradientRefinement
from spectrim.run.cut.zero_sum import cut_in_stages
from spectrim.run.cutting_all import choose, cut_targets


def job_for(**recipe):
    fields = {
        "count": 6,
        "flow": "one-shot",
        "allocate": {"rule": "zero_sum", "gradient_windows": 6},
        "calibration": {"batch": 4},
        **recipe,
    }
    return make_job(**fields)


def half_dense(plan):
    """The plan with every second target dense."""
    from dataclasses import replace

    entries = tuple(
        replace(e, rank=None, storage="dense", bytes=e.dense_bytes) if i % 2 else e
        for i, e in enumerate(plan.entries)
    )
    return Plan(entries, plan.keep, plan.rule)


def best_on_outputs(W, X, k):
    """`U_k U_kᵀ W` with `U_k` the leading output directions, from an SVD of the outputs."""
    U = torch.linalg.svd(W @ X, full_matrices=False)[0][:, :k]
    return U @ (U.T @ W)


def group_inputs(model, anatomy, ids):
    """Target name -> inputs (in, tokens)."""
    seen, handles = {}, []
    for target in anatomy.targets:

        def hook(_m, args, name=target.name):
            seen[name] = args[0].flatten(0, 1).T

        handles.append(get_module(model, target.name).register_forward_pre_hook(hook))
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return seen


def by_hand(job, plan, row):
    """Cut, correct along the gradient on one window, cut again: all with dense algebra."""
    model, anatomy, ids = copy.deepcopy(job.model), job.anatomy, job.ids
    original = {t.name: read_weight(get_module(model, t.name)).clone() for t in anatomy.targets}

    def cut():
        inputs = group_inputs(model, anatomy, ids)
        weights = {t.name: read_weight(get_module(model, t.name)).clone() for t in anatomy.targets}
        for t in anatomy.targets:
            rank = plan[t.name].rank
            new = (
                original[t.name]
                if rank is None
                else best_on_outputs(weights[t.name], inputs[t.name], rank)
            )
            get_module(model, t.name).weight.data.copy_(new)

    cut()
    parameters = {t.name: get_module(model, t.name).weight for t in anatomy.targets}
    window = ids[row : row + 1]
    out = model(input_ids=window, use_cache=False).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(out, window[:, 1:].flatten())
    gradients = dict(
        zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
    )
    for name, g in gradients.items():
        if plan[name].rank is not None:
            lost = original[name] - parameters[name].data
            # The smallest step in units of the columns, so that rescaled channels change nothing.
            step = g * original[name].square().sum(0)
            parameters[name].data += (g * lost).sum() / (g * step).sum() * step
    cut()
    return model


def test_two_stages_are_cut_correct_cut():
    job = job_for()
    plan = half_dense(uniform_plan(job))
    row = int(torch.randperm(len(job.ids), generator=torch.Generator().manual_seed(0))[0])
    expected = by_hand(job, plan, row)
    cut_in_stages(job, ProjectedGradientRefinement(stages=2), plan=plan)
    for entry in plan.entries:
        module = get_module(job.model, entry.name)
        W = read_weight(module) if entry.rank is None else module.dense_weight()
        assert torch.dist(W, read_weight(get_module(expected, entry.name))) < 1e-4 * W.norm()


def test_dense_targets_get_their_original_weights_back():
    job = job_for()
    before = copy.deepcopy(job.model)
    plan = half_dense(uniform_plan(job))
    cut_in_stages(job, ProjectedGradientRefinement(stages=3), plan=plan)
    for entry in plan.entries:
        if entry.rank is None:
            found = read_weight(get_module(job.model, entry.name))
            assert torch.equal(found, read_weight(get_module(before, entry.name)))


def test_one_stage_is_the_plain_cut():
    one, other = job_for(), job_for()
    step = ProjectedGradientRefinement(stages=1)
    plan = cut_in_stages(one, step)
    chosen = choose(other)
    assert cut_targets(other, chosen) == plan
    assert same_state(one.model, other.model)


@pytest.mark.parametrize("windows", [1, 3])
def test_stages_end_at_the_same_size_and_repeat_themselves(windows):
    states = []
    for _ in range(2):
        job = job_for()
        job.recipe = job.recipe.with_changes(
            refine=[{"step": "projected_gradient", "stages": 3, "windows": windows}]
        )
        choice = choose(job)
        plan = cut_targets(job, choice)
        assert job.recipe.keep - 0.02 < plan.achieved_keep <= job.recipe.keep
        assert sum(note.startswith("stage ") for note in job.log.notes) == 2
        states.append(job.model)
    assert same_state(*states)


def test_half_precision_models_are_corrected_in_fp32():
    """The bf16 module rounds a correction away; the fp32 weight behind it must not."""
    job = job_for(dtype=torch.bfloat16)
    plan = uniform_plan(job)
    cut_in_stages(job, ProjectedGradientRefinement(stages=2), plan=plan)
    assert torch.isfinite(logits(job.model, job.ids)).all()
    assert {p.dtype for p in job.model.parameters()} == {torch.bfloat16}
