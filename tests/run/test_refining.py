"""Block refinement inside a run: what it promises on the windows that it did not train on."""

import copy
import math
from functools import partial

import pytest
import torch

from architectures import tiny, windows
from jobs import logits, make_job, same_state, uniform_plan
from spectrim.errors import InputError, NonFiniteError, RecipeError
from spectrim.model.weights import get_module
from spectrim.recipe import BlockRefinement, Recipe
from spectrim.refine.course import hold_out
from spectrim.run.cut.sequential import cut_sequentially
from spectrim.run.train.refining import check_steps

QUICK = {"step": "block", "epochs": 6, "batch": 16, "learning_rate": 3e-3}
OBJECTIVES = ("plain", "whitened", "shifted", "anchored")


def hidden_after(model, block, ids):
    """Hidden states after a block in a whole forward pass from the tokens."""
    seen = []
    handle = get_module(model, block.name).register_forward_hook(
        lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    logits(model, ids)
    handle.remove()
    return seen[0]


def run_job(**recipe):
    job = make_job(calibration={"batch": 16}, **recipe)
    original = copy.deepcopy(job.model)
    cut_sequentially(job, uniform_plan(job))
    return job, original


def test_refinement_lowers_the_held_out_error_of_every_objective():
    size = {"count": 80, "length": 36, "dtype": torch.float32}
    fresh, refined, unrefined = windows(16, 36, seed=77), {}, {}
    for objective in OBJECTIVES:
        decompose = {"objective": objective}
        job, original = run_job(refine=[QUICK], decompose=decompose, **size)
        without, _ = run_job(decompose=decompose, **size)
        facts = [job.log.blocks[block.name] for block in job.anatomy.blocks]
        assert facts[0]["after"] < facts[0]["before"]
        assert all(f["after"] <= f["before"] for f in facts)
        refined[objective], unrefined[objective] = (
            float((logits(j.model, fresh) - logits(original, fresh)).square().mean())
            for j in (job, without)
        )
        assert refined[objective] < unrefined[objective]
    # Most of what the plain SVD loses to the best objective, refinement gives back.
    assert min(unrefined, key=unrefined.__getitem__) == "anchored"
    lost = unrefined["plain"] - unrefined["anchored"]
    assert refined["plain"] - refined["anchored"] < 0.5 * lost


def test_reported_errors_are_those_of_the_finished_block():
    job, original = run_job(refine=[QUICK])
    _, held = hold_out(len(job.ids), QUICK.get("held_out", BlockRefinement().held_out))
    for block in job.anatomy.blocks:
        expected = hidden_after(original, block, job.ids[held])
        found = hidden_after(job.model, block, job.ids[held])
        error = float((found - expected).square().mean())
        assert job.log.blocks[block.name]["after"] == pytest.approx(error, rel=1e-9)


def test_a_training_that_only_hurts_is_not_kept():
    """A huge rate makes every epoch worse; what remains is the unrefined block."""
    hopeless = {**QUICK, "learning_rate": 10.0, "epochs": 2}
    job, _ = run_job(refine=[hopeless])
    unrefined, _ = run_job()
    for facts in job.log.blocks.values():
        assert facts["step"] == 0
        assert facts["after"] == facts["before"]
    fresh = windows(3, seed=9)
    torch.testing.assert_close(
        logits(job.model, fresh), logits(unrefined.model, fresh), rtol=1e-8, atol=1e-8
    )


def test_without_held_out_windows_the_report_says_so():
    job, _ = run_job(refine=[{**QUICK, "held_out": 0.0, "epochs": 2}])
    for block in job.anatomy.blocks:
        assert any(block.name in n and "no window was held out" in n for n in job.log.notes)
        facts = job.log.blocks[block.name]
        assert not facts["selected"] and math.isfinite(facts["before"])


def test_too_few_windows_are_an_error_with_a_way_out():
    job = make_job(count=1, refine=[QUICK])
    with pytest.raises(InputError, match=r"1 calibration window.*held_out: 0"):
        cut_sequentially(job, uniform_plan(job))


DIVERGING = {**QUICK, "learning_rate": 1e300, "epochs": 3, "clip": 1e300}


def test_divergence_names_the_block():
    job = make_job(refine=[DIVERGING])
    with pytest.raises(NonFiniteError, match=r"model\.layers\.0 diverged at step \d"):
        cut_sequentially(job, uniform_plan(job))


def test_divergence_keeps_the_unrefined_block_if_asked():
    job, _ = run_job(refine=[DIVERGING], on_failure="keep-unrefined")
    unrefined, _ = run_job()
    for block in job.anatomy.blocks:
        assert any(block.name in n and "unrefined block was kept" in n for n in job.log.notes)
    assert not job.log.blocks
    fresh = windows(3, seed=9)
    torch.testing.assert_close(
        logits(job.model, fresh), logits(unrefined.model, fresh), rtol=1e-8, atol=1e-8
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_masters_move_the_norms_of_a_bf16_model(name):
    """Steps of 1e-3 vanish in bf16 weights near one; in fp32 masters they add up."""
    step = {**QUICK, "learning_rate": 1e-3, "look_ahead": 1, "held_out": 0.0}
    job = make_job(name, dtype=torch.bfloat16, count=32, refine=[step])
    before = {n: p.clone() for n, p in job.model.named_parameters()}
    cut_sequentially(job, uniform_plan(job))
    after = dict(job.model.named_parameters())
    norms = [n for n in after if ("norm" in n or "ln_" in n) and "weight" in n and ".0." in n]
    assert norms
    assert any(not torch.equal(after[n], before[n]) for n in norms)
    assert all(p.dtype == torch.bfloat16 for p in after.values())


def test_look_ahead_sees_the_error_through_the_next_original_block():
    three = partial(tiny, "llama", num_hidden_layers=3)
    job, original = run_job(refine=[{**QUICK, "epochs": 1, "look_ahead": 1}], model=three()[0])
    unrefined, _ = run_job(model=three()[0])
    _, held = hold_out(24, BlockRefinement().held_out)
    first, second, last = job.anatomy.blocks
    half = copy.deepcopy(original)
    half.model.layers[0] = unrefined.model.model.layers[0]
    ids = job.ids[held]
    error = (hidden_after(half, second, ids) - hidden_after(original, second, ids)).square().mean()
    assert job.log.blocks[first.name]["before"] == pytest.approx(float(error), rel=1e-6)
    # Behind the last block there is nothing to look through.
    reached = hidden_after(job.model, last, ids) - hidden_after(original, last, ids)
    assert job.log.blocks[last.name]["after"] == pytest.approx(float(reached.square().mean()))


def test_other_blocks_get_no_gradients():
    job, _ = run_job(refine=[{**QUICK, "epochs": 1, "look_ahead": 2}])
    assert all(p.grad is None and p.requires_grad for p in job.model.parameters())


def test_same_seed_same_bytes():
    step = {**QUICK, "epochs": 2}
    one, other, third = (run_job(refine=[step], seed=seed)[0] for seed in (0, 0, 1))
    assert same_state(one.model, other.model)
    assert not same_state(one.model, third.model)


@pytest.mark.parametrize(
    ("flow", "steps", "message"),
    [
        ("one-shot", ["block"], "flow: sequential"),
        ("one-shot", ["closed_form"], "flow: sequential"),
        ("sequential", ["projected_gradient"], "flow: one-shot"),
        ("sequential", ["block", "block"], "twice"),
        ("sequential", ["distill", "block"], "put it first"),
    ],
)
def test_steps_that_would_be_passed_over_are_refused(flow, steps, message):
    recipe = Recipe.model_validate(
        {"name": "odd", "flow": flow, "refine": [{"step": s} for s in steps]}
    )
    with pytest.raises(RecipeError, match=message):
        check_steps(recipe)


def test_usual_orders_pass():
    steps = [{"step": s} for s in ("closed_form", "block", "distill", "lora")]
    check_steps(Recipe.model_validate({"name": "all", "flow": "sequential", "refine": steps}))
