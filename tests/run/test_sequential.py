"""The two-stream pass gives what restarting every forward from the tokens would give."""

import copy
import gc

import pytest
import torch

from architectures import BLOCKS, windows
from jobs import logits, make_job, same_state, uniform_plan
from spectrim.layers.lowrank import LowRankLinear
from spectrim.model.capture import capture_inputs
from spectrim.model.stream import Stream
from spectrim.model.weights import get_module, read_weight, write_weight
from spectrim.run.cut.flow import must_restart, paused_bytes
from spectrim.run.cut.one_shot import cut_one_shot
from spectrim.run.cut.sequential import cut_sequentially
from spectrim.tolerances import LEAST_SQUARES_RIDGE

NAMES = ("llama", "gpt2", "gemma2")


def group_input(model, block, group, ids):
    """What a group reads in a whole forward pass from the tokens, as columns (in, tokens)."""
    seen = []
    module = get_module(model, block.name)
    with capture_inputs(module, [group], lambda _, x: seen.append(x.clone())):
        logits(model, ids)
    return torch.cat(seen).T


def leading(S, k):
    return torch.linalg.eigh(S).eigenvectors.flip(1)[:, :k]


def ridge_of(Y, ridge=LEAST_SQUARES_RIDGE):
    return ridge * Y.square().sum() / Y.shape[0]


def nearest_map(target, Y, start, delta):
    """argmin_V ‖target − V Y‖² + delta ‖V − start‖² by least squares on stacked data."""
    stacked = torch.cat([Y, delta.sqrt() * torch.eye(len(Y), dtype=Y.dtype)], 1)
    wanted = torch.cat([target, delta.sqrt() * start], 1)
    return torch.linalg.lstsq(stacked.T, wanted.T, driver="gelsd").solution.T


def anchored(W, X, Y, k):
    norms = W.norm(dim=0)[:, None]
    # Channels in units in which the columns of W have norm one.
    V = nearest_map(W @ X, norms * Y, W / norms.T, ridge_of(norms * Y)) * norms.T
    U = leading((V @ Y) @ (V @ Y).T, k)
    return U @ U.T @ V


def shifted(W, X, Y, k):
    U = leading((W @ Y) @ (W @ Y).T, k)
    return U @ U.T @ W


def updated(W, X, Y, k):
    U = leading((W @ X) @ (W @ X).T, k)
    A = U.T @ W
    B = nearest_map(W @ Y, A @ Y, torch.zeros_like(U), ridge_of(A @ Y))
    return B @ A


def brute_force(job, plan, solve):
    """Both networks restart from the tokens for every single group."""
    original, compressed, ids = copy.deepcopy(job.model), copy.deepcopy(job.model), job.ids
    for block in job.anatomy.blocks:
        for group in block.groups:
            X = group_input(original, block, group, ids)
            Y = group_input(compressed, block, group, ids)
            for target in group.targets:
                W = read_weight(get_module(original, target.name)).clone()
                rank = plan[target.name].rank
                if rank is not None:
                    write_weight(get_module(compressed, target.name), solve(W, X, Y, rank))
    return compressed


WAYS = {
    "anchored": (
        {"decompose": {"objective": "anchored", "ridge": LEAST_SQUARES_RIDGE}},
        anchored,
    ),
    "shifted": ({"decompose": {"objective": "shifted"}}, shifted),
    "updated": (
        {"decompose": {"objective": "whitened"}, "refine": [{"step": "closed_form"}]},
        updated,
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_restarting_every_forward(name, way):
    recipe, solve = WAYS[way]
    job = make_job(name, **recipe)
    plan = uniform_plan(job)
    expected = brute_force(job, plan, solve)
    cut_sequentially(job, plan)
    for target in job.anatomy.targets:
        layer = get_module(job.model, target.name)
        assert isinstance(layer, LowRankLinear)
        W = read_weight(get_module(expected, target.name))
        # Norms of transformers compute in fp32, where a last bit of fp64 can show.
        assert torch.dist(layer.dense_weight(), W) < 1e-6 * W.norm()
    fresh = windows(3, seed=9)
    torch.testing.assert_close(
        logits(job.model, fresh), logits(expected, fresh), rtol=1e-5, atol=1e-6
    )


def carried(job, plan):
    """Both networks restart for every group; what joins the stream makes up for its losses."""
    original, compressed, ids = copy.deepcopy(job.model), copy.deepcopy(job.model), job.ids

    def stream(model, block, place):
        seen = []
        module = get_module(model, block.name).get_submodule(place)
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
        logits(model, ids)
        handle.remove()
        return seen[0].flatten(0, -2).T

    for block in job.anatomy.blocks:
        for group in block.groups:
            X = group_input(original, block, group, ids)
            Y = group_input(compressed, block, group, ids)
            lost = {
                t.name: stream(original, block, t.joins) - stream(compressed, block, t.joins)
                for t in group.targets
                if t.joins is not None
            }
            for target in group.targets:
                W = read_weight(get_module(original, target.name)).clone()
                norms = W.norm(dim=0)[:, None]
                wanted = W @ X + lost.get(target.name, 0.0)
                V = nearest_map(wanted, norms * Y, W / norms.T, ridge_of(norms * Y)) * norms.T
                U = leading((V @ Y) @ (V @ Y).T, plan[target.name].rank)
                write_weight(get_module(compressed, target.name), U @ U.T @ V)
    return compressed


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("disk", [False, True])
def test_what_joins_the_stream_makes_up_for_what_that_has_lost(name, disk, tmp_path):
    objective = {"objective": "anchored", "ridge": LEAST_SQUARES_RIDGE, "carry": True}
    options = {"offload_streams": tmp_path} if disk else {}
    job = make_job(name, decompose=objective, **options)
    assert sum(t.joins is not None for t in job.anatomy.targets) == 2 * BLOCKS
    plan = uniform_plan(job)
    expected = carried(job, plan)
    cut_sequentially(job, plan)
    for target in job.anatomy.targets:
        W = read_weight(get_module(expected, target.name))
        found = get_module(job.model, target.name).dense_weight()
        assert torch.dist(found, W) < 1e-5 * W.norm(), target.name


@pytest.mark.parametrize("name", NAMES)
def test_whitened_without_refinement_equals_one_shot(name):
    one, other = (make_job(name, flow=flow) for flow in ("one-shot", "sequential"))
    plan = uniform_plan(one)
    cut_one_shot(one, plan)
    cut_sequentially(other, plan)
    fresh = windows(3, seed=9)
    torch.testing.assert_close(
        logits(one.model, fresh), logits(other.model, fresh), rtol=1e-9, atol=1e-9
    )


def counted(job):
    """Forwards of every block, of both streams: a copy of a block takes the hook along."""
    passes = {block.index: 0 for block in job.anatomy.blocks}

    def count(index):
        def hook(*_):
            passes[index] += 1

        return hook

    for block in job.anatomy.blocks:
        norm = get_module(job.model, block.name).input_layernorm
        norm.register_forward_pre_hook(count(block.index))
    cut_sequentially(job, uniform_plan(job))
    recording = 1
    return [n - recording for n in passes.values()]


@pytest.mark.parametrize("objective", ["whitened", "anchored"])
def test_a_block_costs_one_forward_per_stream(objective):
    job = make_job(decompose={"objective": objective}, count=20)
    batches = 3  # of 8, 8 and 4
    assert counted(job) == [2 * batches] * BLOCKS
    assert not job.log.notes


def test_where_memory_is_short_forwards_begin_anew_and_the_report_says_so(tmp_path):
    job = make_job(decompose={"objective": "anchored"}, count=20, offload_streams=tmp_path)
    batches, groups = 3, 4
    assert counted(job) == [2 * batches * (groups + 1)] * BLOCKS
    assert job.log.notes == ["forwards were begun anew at every group, to save memory"]


def test_an_accelerator_is_asked_for_its_free_memory(monkeypatch):
    job = make_job(dtype=torch.float32)
    stream = Stream.empty(24, 12, 40, torch.float32)
    # Residual and norm; at the last group its input and what gate and up gave.
    needed = 24 * 12 * 4 * (2 * 40 + 54 + 2 * 54)
    assert max(paused_bytes(block, stream) for block in job.anatomy.blocks) == needed
    job.device = torch.device("cuda")
    for free, expected in ((4 * needed, False), (4 * needed - 4, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        assert must_restart(job, stream, streams=2) is expected


@pytest.mark.parametrize("objective", ["plain", "whitened", "activation", "anchored"])
def test_later_blocks_see_what_earlier_ones_became(objective):
    """Measured errors of the shifted objectives are those of the finished network."""
    job = make_job(decompose={"objective": objective, "ridge": LEAST_SQUARES_RIDGE})
    original = copy.deepcopy(job.model)
    cut_sequentially(job, uniform_plan(job))
    facts = job.log.targets
    assert all(
        f.get("ridge") == (LEAST_SQUARES_RIDGE if objective == "anchored" else None)
        for f in facts.values()
    )
    assert facts.keys() == {t.name for t in job.anatomy.targets}
    assert all(0 <= f["measured_error"] < 2 for f in facts.values())
    if objective != "anchored":
        return
    for block in job.anatomy.blocks:
        for group in block.groups:
            X = group_input(original, block, group, job.ids)
            Y = group_input(job.model, block, group, job.ids)
            for target in group.targets:
                output = read_weight(get_module(original, target.name)) @ X
                layer = get_module(job.model, target.name)
                error = (
                    torch.dist(layer.dense_weight() @ Y, output).square() / output.square().sum()
                )
                assert facts[target.name]["measured_error"] == pytest.approx(float(error), rel=1e-6)
                assert facts[target.name]["predicted_error"] == pytest.approx(
                    float(error), rel=1e-4
                )


def test_streams_on_disk_change_nothing(tmp_path):
    recipe = {
        "decompose": {"objective": "anchored"},
        "refine": [{"step": "block", "epochs": 2, "look_ahead": 1}],
    }
    here, there = make_job(**recipe), make_job(**recipe, offload_streams=tmp_path)
    for job in (here, there):
        cut_sequentially(job, uniform_plan(job))
    assert same_state(here.model, there.model)
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_dense_targets_stay_as_they_are():
    job = make_job(decompose={"objective": "anchored"}, keep=1.0)
    before = copy.deepcopy(job.model)
    cut_sequentially(job, uniform_plan(job))
    assert same_state(before, job.model)


def test_batches_do_not_matter():
    one = make_job(decompose={"objective": "anchored"})
    other = make_job(decompose={"objective": "anchored"}, calibration={"batch": 5})
    for job in (one, other):
        cut_sequentially(job, uniform_plan(job))
    fresh = windows(3, seed=9)
    torch.testing.assert_close(
        logits(one.model, fresh), logits(other.model, fresh), rtol=1e-8, atol=1e-8
    )


def test_closed_form_then_blocks_start_from_the_updated_layer():
    refine = [{"step": "closed_form"}, {"step": "block", "epochs": 1, "learning_rate": 1e-30}]
    one = make_job(refine=refine[:1])
    other = make_job(refine=refine)
    for job in (one, other):
        cut_sequentially(job, uniform_plan(job))
    layers = [get_module(job.model, one.anatomy.targets[0].name) for job in (one, other)]
    torch.testing.assert_close(
        layers[0].dense_weight(), layers[1].dense_weight(), rtol=1e-6, atol=1e-6
    )
    # Balanced: both factors of the trained layer carry the same singular values.
    up, down = layers[1].up.weight, layers[1].down.weight
    torch.testing.assert_close(up.T @ up, down @ down.T, rtol=1e-6, atol=1e-6)
