"""Recovery by adapters: merged exactly, one factor at a time, never worse on held-out windows."""

import builtins
import copy
import math

import pytest
import torch
from torch.nn import functional as F

from architectures import tiny, windows
from jobs import logits, make_job, same_state, uniform_plan
from spectrim.data.windows import given_windows
from spectrim.errors import MissingExtraError, NonFiniteError
from spectrim.layers.lowrank import LowRankLinear
from spectrim.model.weights import get_module
from spectrim.refine.lora import LoraTraining, require_peft
from spectrim.run.cut.one_shot import cut_one_shot
from spectrim.run.train.whole_network import carry_out, prepare

STEP = {"step": "lora", "rank": 2, "batch": 8, "epochs": 6, "learning_rate": 5e-3}

HELD = (torch.arange(4) * 32) // 4  # an eighth of 32 windows, spread evenly


def recovered(name="llama", *, step=STEP, count=32, held=None, **recipe):
    # A text of a dozen words: what there is to learn shows on windows that were not seen.
    ids = windows(count + 8, 16, vocab_size=12)
    if held is not None:
        ids[HELD] = held
    job = make_job(name, **{"dtype": torch.float32, **recipe}, flow="one-shot", refine=[step])
    job.windows, fresh = given_windows(ids[:count]), ids[count:]
    steps = prepare(job)
    cut_one_shot(job, uniform_plan(job))
    unrefined = copy.deepcopy(job.model)
    carry_out(job, steps)
    return job, unrefined, fresh


def loss(model, ids):
    predicted = logits(model, ids)[:, :-1].double().flatten(0, 1)
    return float(F.cross_entropy(predicted, ids[:, 1:].flatten()))


def moved(job, unrefined):
    """Names of the parameters that are not as they were."""
    before, after = unrefined.state_dict(), job.model.state_dict()
    assert before.keys() == after.keys()
    return {name for name in after if not torch.equal(before[name], after[name])}


def test_warmup_is_capped_and_epochs_are_judged():
    settings = LoraTraining().settings(50_000)
    assert settings.warmup == pytest.approx(100 / settings.steps)
    few = LoraTraining(batch=8).settings(32)
    assert (few.steps, few.judge_every, few.warmup) == (8, 4, 0.1)


def test_a_missing_package_names_the_extra_before_anything_is_cut(monkeypatch):
    plain = builtins.__import__

    def without_peft(name, *args, **kwargs):
        if name == "peft":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_peft)
    job = make_job(flow="one-shot", refine=[STEP])
    with pytest.raises(MissingExtraError, match=r"spectrim\[lora\]"):
        prepare(job)
    with pytest.raises(MissingExtraError):
        require_peft()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_recovery_lowers_the_loss_on_fresh_text(name):
    pytest.importorskip("peft")
    job, unrefined, fresh = recovered(name)
    facts = job.log.network
    assert list(facts) == ["lora 1 down", "lora 2 up"]
    held = job.ids[HELD]
    assert facts["lora 1 down"]["before"] == pytest.approx(loss(unrefined, held), rel=1e-4)
    assert facts["lora 2 up"]["before"] == pytest.approx(facts["lora 1 down"]["after"], rel=1e-4)
    assert facts["lora 2 up"]["after"] == pytest.approx(loss(job.model, held), rel=1e-4)
    assert loss(job.model, fresh) < loss(unrefined, fresh)


@pytest.mark.parametrize("factor", ["down", "up"])
def test_only_the_factor_is_changed_by_a_low_rank_update(factor):
    pytest.importorskip("peft")
    job, unrefined, _ = recovered(step={**STEP, "order": [factor]})
    names = {f"{t.name}.{factor}.weight" for t in job.anatomy.targets}
    assert moved(job, unrefined) == names
    for target in job.anatomy.targets:
        layer, before = (get_module(m, target.name) for m in (job.model, unrefined))
        assert type(layer) is LowRankLinear and type(getattr(layer, factor)) is torch.nn.Linear
        change = getattr(layer, factor).weight - getattr(before, factor).weight
        assert torch.linalg.matrix_rank(change.detach().double(), rtol=1e-4) <= STEP["rank"]
    assert not hasattr(job.model, "peft_config")
    assert not any(m.training for m in job.model.modules())
    assert all(p.requires_grad and p.grad is None for p in job.model.parameters())


def test_a_stage_that_hurts_is_not_merged():
    """Held-out windows of other words: what is learned from the rest makes them less likely."""
    pytest.importorskip("peft")
    model, _ = tiny("llama", num_hidden_layers=3)
    job, unrefined, _ = recovered(model=model, held=12 + windows(4, 16, seed=1, vocab_size=55))
    assert not moved(job, unrefined)
    assert all(f["step"] == 0 for f in job.log.network.values())


def test_same_seed_same_bytes_and_the_global_generator_is_left_alone():
    pytest.importorskip("peft")
    step = {**STEP, "epochs": 1, "dropout": 0.3}
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one, _, _ = recovered(step=step, count=16)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(12)
    other, _, _ = recovered(step=step, count=16)
    third, _, _ = recovered(step=step, count=16, seed=1)
    assert same_state(one.model, other.model) and not same_state(one.model, third.model)


def test_bf16_models_stay_bf16():
    pytest.importorskip("peft")
    job, unrefined, _ = recovered(dtype=torch.bfloat16)
    assert moved(job, unrefined)
    assert {p.dtype for p in job.model.parameters()} == {torch.bfloat16}


def test_divergence_leaves_the_factors(monkeypatch):
    pytest.importorskip("peft")
    wild = {**STEP, "learning_rate": 1e25, "held_out": 0.0}
    with pytest.raises(NonFiniteError, match="by LoRA diverged"):
        recovered(step=wild)
    job, unrefined, _ = recovered(step=wild, on_failure="keep-unrefined")
    assert not moved(job, unrefined)
    assert all(math.isfinite(float(p.detach().abs().max())) for p in job.model.parameters())
