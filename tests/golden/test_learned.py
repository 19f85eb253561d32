"""Golden numbers of short learned runs on the bundled trained model.

Protocol as in `test_bundled_model.py`: 32 calibration windows of 256 tokens, seed 0; 24 held-out
windows of 256 tokens; fp32. The runs are a tenth as long as those of benchmarks/learned.py: they
show that the recipes work, not what they reach.
"""

from functools import cache

import pytest

from spectrim import api
from spectrim.data.text import read_text
from spectrim.data.windows import evaluation_windows
from spectrim.demo.run import CALIBRATION, HELD_OUT, MODEL
from spectrim.evaluate.perplexity import perplexity
from spectrim.recipes import get_recipe
from spectrim.run.learned.elastic import ElasticModel
from spectrim.run.loading import load_model

RELATIVE = 0.015
"""Rounding differs between processors, and a training carries it on."""

ACIP = {
    # Deaths of so few steps would be noise; the one-pass order takes the rest of the same path.
    "order": "fisher",
    "order_steps": 12,
    "stop_keep": 0.5,
    "batch": 2,
    "lora_rank": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "clip": 1.0,
    "heal_steps": 12,
    "heal_parts": "factors",
    "heal_learning_rate": 5e-4,
    "heal_factor_learning_rate": 1e-4,
    "heal_grid": 8,
}
SOCO = {
    "batch": 2,
    "learning_rate": 0.03,
    "warmup_steps": 2,
    "explore_steps": 24,
    "oscillate_steps": 2,
    "sparsify_steps": 6,
    "recover_steps": 8,
    "pressure_growth": 1.15,
    "dead_after": 2,
    "sensitivity_steps": 12,
}
GOLDEN = {("acip", 0.8): 0.0, ("acip", 0.6): 0.0, ("soco", 0.6): 0.0}
WHITENED = {0.8: 42.467, 0.6: 47.085}
"""Of `svd-llm`, from `test_bundled_model.py`."""


def compressed(name, keep, learn):
    recipe = get_recipe(name).with_changes(keep=keep, learn=learn)
    text = {"text": CALIBRATION, "windows": 32, "window_length": 256}
    return api.compress(str(MODEL), recipe=recipe, **text)


def held_out(model):
    tokenizer = load_model(MODEL).tokenizer
    windows = evaluation_windows(read_text(HELD_OUT), tokenizer, window_length=256)
    return perplexity(model.float(), windows.take(24)).perplexity


@cache
def every_size():
    """ACIP's one run, opened."""
    return ElasticModel(load_model(MODEL), compressed("acip", 0.5, ACIP).elastic)


@cache
def measured(name, keep):
    if name == "soco":
        return held_out(compressed(name, keep, SOCO).model)
    opened = every_size()
    opened.resize(keep)
    return held_out(opened.model)


@pytest.mark.parametrize(("name", "keep"), GOLDEN)
def test_perplexity_is_golden(name, keep):
    assert measured(name, keep) == pytest.approx(GOLDEN[name, keep], rel=RELATIVE)


@pytest.mark.parametrize(("name", "keep"), GOLDEN)
def test_even_a_short_training_beats_whitening(name, keep):
    assert measured(name, keep) < WHITENED[keep]
