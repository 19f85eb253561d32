"""Golden numbers on the bundled trained model: bundled calibration text, bundled held-out text.

Protocol: 32 calibration windows of 256 tokens, seed 0; 24 held-out windows of 256 tokens; fp32;
uniform ranks with the rest filled. A change that must not alter results leaves these alone.
"""

import pytest

from spectrim import api
from spectrim.data.text import read_text
from spectrim.data.windows import evaluation_windows
from spectrim.demo.run import CALIBRATION, HELD_OUT, MODEL
from spectrim.evaluate.perplexity import perplexity
from spectrim.run.loading import load_model

RELATIVE = 0.005
"""Rounding differs between processors and library versions; methods differ by far more."""

GOLDEN = {
    ("dense", None): 40.653,
    ("svd", 0.8): 43.591,
    ("svd", 0.6): 53.250,
    ("svd", 0.4): 120.383,
    ("svd-llm", 0.8): 42.467,
    ("svd-llm", 0.6): 47.085,
    ("svd-llm", 0.4): 66.871,
    ("spectrim", 0.6): 41.277,
    ("spectrim", 0.4): 44.923,
}


def held_out(loaded):
    windows = evaluation_windows(read_text(HELD_OUT), loaded.tokenizer, window_length=256)
    return windows.take(24)


def compressed(recipe, keep):
    result = api.compress(
        str(MODEL), recipe=recipe, keep=keep, text=CALIBRATION, windows=32, window_length=256
    )
    return result.model.float(), result.tokenizer


@pytest.fixture(scope="module")
def dense():
    loaded = load_model(MODEL)
    windows = held_out(loaded)
    return perplexity(loaded.model, windows).perplexity, windows


def measured(recipe, keep, windows):
    model, _ = compressed(recipe, keep)
    return perplexity(model, windows).perplexity


def test_dense_perplexity(dense):
    assert dense[0] == pytest.approx(GOLDEN["dense", None], rel=RELATIVE)


@pytest.mark.parametrize(("recipe", "keep"), [key for key in GOLDEN if key[1] is not None])
def test_perplexity_is_golden(recipe, keep, dense):
    assert measured(recipe, keep, dense[1]) == pytest.approx(GOLDEN[recipe, keep], rel=RELATIVE)


def test_the_default_recipe_beats_whitening():
    dense = GOLDEN["dense", None]
    for keep in (0.6, 0.4):
        assert GOLDEN["spectrim", keep] - dense < 0.3 * (GOLDEN["svd-llm", keep] - dense)


def test_whitening_beats_plain_svd_by_a_wide_margin():
    for keep in (0.6, 0.4):
        assert GOLDEN["svd-llm", keep] < 0.9 * GOLDEN["svd", keep]
