"""Golden numbers of a short run of ACIP on the bundled trained model: every size from it.

Protocol as in `test_bundled_model.py`: 32 calibration windows of 256 tokens, seed 0; 24 held-out
windows of 256 tokens; fp32. A training of gates or scores is minutes long and in fewer steps noise:
benchmarks/learned.py has those; here the order is that of one gradient pass, then healed.
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

pytestmark = pytest.mark.slow

RELATIVE = 0.015
"""Rounding differs between processors, and a training carries it on."""

ACIP = {
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
GOLDEN = {0.8: 41.082, 0.6: 42.540}
WHITENED = {0.8: 42.467, 0.6: 47.085}
"""Of `svd-llm`, from `test_bundled_model.py`."""


@cache
def every_size():
    """ACIP's one run, opened."""
    recipe = get_recipe("acip").with_changes(keep=ACIP["stop_keep"], learn=ACIP)
    text = {"text": CALIBRATION, "windows": 32, "window_length": 256}
    return ElasticModel(load_model(MODEL), api.compress(str(MODEL), recipe=recipe, **text).elastic)


@cache
def measured(keep):
    opened = every_size()
    opened.resize(keep)
    windows = evaluation_windows(read_text(HELD_OUT), opened.tokenizer, window_length=256)
    return perplexity(opened.model.float(), windows.take(24)).perplexity


@pytest.mark.parametrize("keep", GOLDEN)
def test_every_size_of_one_short_run_is_golden(keep):
    assert measured(keep) == pytest.approx(GOLDEN[keep], rel=RELATIVE)


@pytest.mark.parametrize("keep", GOLDEN)
def test_even_a_short_run_beats_whitening(keep):
    assert measured(keep) < 0.97 * WHITENED[keep]
