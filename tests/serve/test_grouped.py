"""Experts of equal ranks multiplied at once: the same outputs, and the same model on disk."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from architectures import mixture, windows
from spectrim.recipes.presets import get_recipe
from spectrim.run.compress import run_recipe
from spectrim.run.loading import LoadedModel
from spectrim.run.options import RunOptions
from spectrim.run.store.saving import save_outcome
from spectrim.serve.grouped import group_experts

CLOSE = 1e-4  # of the largest logit: fp32 products in another order


def compressed(kind, **allocate):
    recipe = get_recipe("svd").with_changes(keep=0.6, allocate=allocate)
    loaded = LoadedModel(mixture(kind), None, "tiny", torch.float32)
    return run_recipe(loaded, recipe, RunOptions(measure=False), text=windows(4, 16))


def logits(model):
    with torch.no_grad():
        return model(windows(2), use_cache=False).logits


# Stacked with out last, interleaved with in last and biases, and a single matrix per parameter.
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h"])
def test_grouped_experts_compute_and_save_what_single_ones_do(kind, tmp_path):
    outcome = compressed(kind, experts="equal", multiple=4)
    expected = logits(outcome.model)
    calls = []
    layer = next(m for n, m in outcome.model.named_modules() if n.endswith("down_proj.0"))
    layer.register_forward_hook(lambda *_: calls.append(1))
    grouped, left = group_experts(outcome.model)
    assert len(grouped) > 5 and not left
    outcome.model.set_experts_implementation("grouped_mm")
    found = logits(outcome.model)
    assert not calls
    assert (found - expected).abs().max() < CLOSE * expected.abs().max()
    save_outcome(outcome, tmp_path / "small")
    again = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "small"))
    assert (again - expected).abs().max() < CLOSE * expected.abs().max()


@pytest.mark.parametrize(
    ("allocate", "reason"),
    [
        ({"experts": "equal"}, "not aligned"),
        ({"multiple": 4, "rule": "loss_ratio"}, "differ"),
    ],
)
def test_experts_that_cannot_be_grouped_stay_single_with_the_reason(allocate, reason):
    outcome = compressed("mixtral", **allocate)
    expected = logits(outcome.model)
    grouped, left = group_experts(outcome.model)
    assert left and not grouped and all(reason in why for why in left.values())
    assert torch.equal(logits(outcome.model), expected)
