"""Losses of held-out windows against the network's own gradients, and moments of all windows."""

import numpy as np
import pytest
import torch

from jobs import make_job
from spectrim.decompose import decompose
from spectrim.model.weights import get_module, read_weight
from spectrim.run.survey.backward import gathered_moments
from spectrim.run.survey.survey import make_survey, surveyed_choice

KFAC = {"objective": "kfac", "shrink_in": 0.1, "shrink_out": 0.1}
RULE = {"rule": "knapsack", "score": "kfac"}


def job_for(architecture="llama", *, held_out=0.25, decompose=KFAC, **changes):
    return make_job(
        architecture,
        flow="one-shot",
        decompose=decompose,
        allocate=RULE | {"held_out": held_out},
        **changes,
    )


@pytest.fixture(scope="module")
def surveyed():
    job = job_for()
    return job, make_survey(job)


def gradients(model, name, ids):
    """Inputs of a target and gradients of the summed loss at its outputs, (N, T, ·)."""
    seen = {}

    def keep(_module, args, output):
        output.retain_grad()
        seen.update(x=args[0].detach(), y=output)

    handle = get_module(model, name).register_forward_hook(keep)
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        model.zero_grad()
        flat = (logits.flatten(0, 1), ids[:, 1:].flatten())
        torch.nn.functional.cross_entropy(*flat, reduction="sum").backward()
    handle.remove()
    model.zero_grad()
    return seen["x"], seen["y"].grad


@pytest.mark.parametrize("place", [0, 3, 6])
def test_losses_are_what_held_out_tokens_lose_to_second_order(surveyed, place):
    job, survey = surveyed
    held, rest = job.ids[:6], job.ids[6:]
    target = job.anatomy.targets[place]
    choice = surveyed_choice(job.recipe.decompose)
    outputs, inputs = gathered_moments(job_for(), choice, ids=rest, input_needs=frozenset({"C"}))
    first = next(g for g in job.anatomy.groups() if target in g.targets).targets[0].name
    W = read_weight(get_module(job.model, target.name))
    options = {"name": target.name, "shrink_in": 0.1, "shrink_out": 0.1}
    whole = decompose("kfac", W, inputs[first], outputs[target.name], **options)
    x, g = gradients(job.model, target.name, held)
    found = survey.losses["kfac"][target.name]
    energy = next(c.energy for c in survey.curves if c.name == target.name)
    assert found[-1] == 0 and (np.diff(found) <= 0).all()
    expected = []
    for k in range(whole.rank):
        E = whole.up[:, k:].double() @ whole.down[k:].double()
        change = torch.einsum("bto,oi,bti->bt", g, E, x)
        loss = 0.5 * change.square()
        expected.append(float((loss / (1 + loss)).sum()) / held[:, 1:].numel())
    falling = np.maximum.accumulate(np.array(expected)[::-1])[::-1]
    predicted = np.cumsum(energy[::-1])[::-1]
    assert found[:-1] == pytest.approx(np.sqrt(falling * predicted), rel=1e-4)


def test_what_is_cut_has_seen_all_windows(surveyed):
    job, survey = surveyed
    plain = job_for(held_out=0.0)
    bare = make_survey(plain)
    for name, record in plain.outputs.items():
        torch.testing.assert_close(job.outputs[name].G, record.G, rtol=1e-6, atol=1e-12)
        assert job.outputs[name].tokens == record.tokens
    for name, record in plain.inputs.items():
        torch.testing.assert_close(job.inputs[name].C, record.C, rtol=1e-6, atol=1e-9)
    for one, other in zip(survey.curves, bare.curves, strict=True):
        assert one.energy == pytest.approx(other.energy, rel=1e-4, abs=1e-12)
        assert not np.allclose(survey.losses["kfac"][one.name], bare.losses["kfac"][one.name])


@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"count": 1}, "the only window cannot be held out"),
        ({"decompose": {"objective": "whitened"}}, "this is whitened"),
    ],
)
def test_what_is_not_held_out_is_said(options, note):
    job = job_for(**options)
    survey = make_survey(job, scores=("kfac",))
    assert set(survey.losses["kfac"]) == {t.name for t in job.anatomy.targets}
    assert any(note in said for said in job.log.notes)
