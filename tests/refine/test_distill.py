"""Distillation lowers the divergence from the original on windows that it was not trained on."""

import copy

import pytest
import torch
from torch.nn import functional as F

from architectures import tiny, windows
from jobs import logits, make_job, same_state, uniform_plan
from spectrim.data.self_text import sample_windows
from spectrim.errors import NonFiniteError
from spectrim.model.losses import kl_per_token
from spectrim.run.cut.one_shot import cut_one_shot
from spectrim.run.train.whole_network import carry_out, prepare

STEP = {
    "step": "distill",
    "steps": 24,
    "batch": 8,
    "learning_rate": 3e-3,
    "evaluate_every": 6,
}


def distilled(name="llama", *, step=STEP, **recipe):
    job = make_job(
        name,
        **{"count": 32, "length": 20, "dtype": torch.float32, **recipe},
        flow="one-shot",
        refine=[step],
    )
    original = copy.deepcopy(job.model)
    steps = prepare(job)
    cut_one_shot(job, uniform_plan(job))
    unrefined = copy.deepcopy(job.model)
    carry_out(job, steps)
    return job, original, unrefined


def divergence(model, original, ids):
    p, q = (F.softmax(logits(m, ids).double(), -1) for m in (original, model))
    return float((p * (p / q).log()).sum(-1).mean())


def test_kl_is_that_of_the_definition():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 3, 7, generator=g), torch.randn(2, 3, 7, generator=g)
    p, q = F.softmax(a.double(), -1), F.softmax(b.double(), -1)
    torch.testing.assert_close(kl_per_token(a, b).double(), (p * (p / q).log()).sum(-1))
    assert torch.equal(kl_per_token(a, a), torch.zeros(2, 3))
    assert kl_per_token(a.bfloat16(), b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_divergence_falls_on_fresh_windows_and_is_what_the_report_says(name):
    job, original, unrefined = distilled(name)
    facts = job.log.network["distill"]
    held = job.ids[(torch.arange(4) * 32) // 4]  # an eighth, spread evenly
    assert facts["before"] == pytest.approx(divergence(unrefined, original, held), rel=1e-4)
    assert facts["after"] == pytest.approx(divergence(job.model, original, held), rel=1e-4)
    fresh = windows(16, 20, seed=5)
    assert divergence(job.model, original, fresh) < divergence(unrefined, original, fresh)
    assert facts["after"] < facts["before"]
    assert job.log.stages["distill"] > 0


def test_only_blocks_are_trained():
    job, _original, unrefined = distilled()
    before, after = unrefined.state_dict(), job.model.state_dict()
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    inside = {name for name in after if ".layers." in name}
    assert moved == inside
    assert all(p.grad is None and p.requires_grad for p in job.model.parameters())


def test_bf16_models_move_and_stay_bf16():
    job, _original, _unrefined = distilled(dtype=torch.bfloat16)
    facts = job.log.network["distill"]
    assert facts["after"] < facts["before"]
    assert {p.dtype for p in job.model.parameters()} == {torch.bfloat16}


def test_further_windows_come_from_the_original_model():
    job, original, _ = distilled(step={**STEP, "windows": 16, "steps": 6}, count=8)
    expected = sample_windows(original, windows=16, window_length=20, seed=1)
    (note,) = (n for n in job.log.notes if n.startswith("distillation: 16 further windows"))
    assert expected.fingerprint()[:16] in note


def test_same_seed_same_bytes():
    step = {**STEP, "steps": 6, "windows": 8}
    one, other, third = (distilled(step=step, seed=s, count=8)[0].model for s in (0, 0, 1))
    assert same_state(one, other) and not same_state(one, third)


def test_divergence_of_training_keeps_the_network_if_asked(tmp_path):
    wild = {**STEP, "learning_rate": 1e300, "clip": 1e300}
    with pytest.raises(NonFiniteError, match="the whole network diverged"):
        distilled(step=wild, dtype=torch.float64)
    job, _, unrefined = distilled(
        step=wild, dtype=torch.float64, on_failure="keep-unrefined", offload_streams=tmp_path
    )
    assert same_state(job.model, unrefined)
    assert any("kept as it was" in note for note in job.log.notes)


def test_steps_follow_one_another():
    steps = [{**STEP, "steps": 6}, {**STEP, "steps": 6}]
    job = make_job(count=16, flow="one-shot", refine=steps, model=tiny("llama")[0])
    prepared = prepare(job)
    assert [name for name, *_ in prepared] == ["distill", "distill"]
    cut_one_shot(job, uniform_plan(job))
    carry_out(job, prepared)
    assert not prepared
