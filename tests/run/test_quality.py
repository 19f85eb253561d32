"""Before and after are the perplexities of the two models on windows that the run did not read."""

from __future__ import annotations

import shutil

import pytest
import torch

from architectures import tiny, windows
from spectrim import api
from spectrim.data.text import Text
from spectrim.data.windows import calibration_windows, given_windows
from spectrim.demo.run import CALIBRATION, HELD_OUT
from spectrim.demo.run import MODEL as BUNDLED
from spectrim.evaluate.perplexity import perplexity
from spectrim.recipes import get_recipe
from spectrim.run.loading import load_model
from spectrim.run.quality import (
    FEWEST_TOKENS,
    FEWEST_WINDOWS,
    MOST_WINDOWS,
    affordable,
    passes_over_windows,
)

SMALL = {"windows": 8, "window_length": 32, "recipe": "svd-llm", "keep": 0.6}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with the bundled tokenizer, stored in bf16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("quality") / "model"
    made, _ = tiny("llama", vocab_size=4096)
    made.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(CALIBRATION.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def result(model, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "out"
    return api.compress(model, text=text, output=out, evaluation_text=HELD_OUT, **SMALL)


def test_it_is_what_measuring_both_folders_gives(model, text, result):
    spare = calibration_windows(
        Text.from_documents([text.read_text(encoding="utf-8")], name="t"),
        load_model(model).tokenizer,
        windows=8,
        window_length=32,
    ).spare
    held_out, other = result.report["measured"]["texts"]
    assert held_out["kind"] == "held out" and other["kind"] == "other"
    assert held_out["text"] == "text.txt" and other["text"] == "heldout.txt"
    count = held_out["windows"]
    rows = torch.linspace(0, len(spare) - 1, count).round().long()
    for name, folder in (("dense", model), ("compressed", result.output)):
        measured = perplexity(load_model(folder).model, spare.ids[rows])
        assert held_out[name]["perplexity"] == pytest.approx(measured.perplexity, rel=1e-5)
    change = held_out["compressed"]["nll"] - held_out["dense"]["nll"]
    assert held_out["difference"]["nll"] == pytest.approx(change)


def test_the_result_has_the_stored_dtype_afterwards(result):
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


def test_ready_windows_and_samples_are_called_what_they_are(model):
    ids = torch.randint(0, 4096, (4, 16), generator=torch.Generator().manual_seed(0))
    given = api.compress(model, text=ids, recipe="svd-llm", keep=0.6)
    (seen,) = given.report["measured"]["texts"]
    assert seen["kind"] == "calibration" and "calibration windows themselves" in seen["what"]
    sampled = api.compress(model, text="self", **SMALL)
    (seen,) = sampled.report["measured"]["texts"]
    assert seen["kind"] == "sampled" and "sampled from the model itself" in seen["what"]


def test_what_is_not_measured_says_why():
    made, _ = tiny("llama")
    dry = api.compress(made, recipe="svd", keep=0.6, tokenizer=None)
    assert dry.report["measured"]["texts"] == []
    assert "no text" in dry.report["measured"]["why_not"]
    off = api.compress(tiny("llama")[0], text=windows(4, 8), recipe="svd-llm", measure=False)
    assert off.report["measured"] is None


@pytest.mark.parametrize("name", ["svd-llm", "aa-svd", "spectrim", "zs-svd"])
@pytest.mark.parametrize("texts", [1, 2])
def test_both_passes_take_a_tenth_of_the_runs_own_or_few_tokens(name, texts):
    recipe = get_recipe(name)
    for count, length in ((4, 16), (64, 256), (256, 2048)):
        read = given_windows(torch.zeros(count, length, dtype=torch.int64))
        chosen = affordable(recipe, read, length, texts)
        assert FEWEST_WINDOWS <= chosen <= MOST_WINDOWS
        tokens = 2 * texts * chosen * length
        own = passes_over_windows(recipe) * count * length
        few = 2 * min(FEWEST_TOKENS, count * length)
        assert tokens <= max(0.1 * own, few, 2 * texts * FEWEST_WINDOWS * length)
