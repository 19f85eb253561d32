"""One plan over all forms: exact bytes, codes that stay, and the same model from disk."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

import spectrim.storage.quantizer  # noqa: F401  (teaches transformers to load the folders)
from architectures import tiny, windows
from jobs import logits
from spectrim import api
from spectrim.allocate.yardstick import YARDSTICKS, sentence, yardstick
from spectrim.layers.swap import compressed_layers
from spectrim.storage.inspect import inspect_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny("llama")[0].to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("auto") / "out"
    return api.compress(
        source, keep=0.3, recipe="spectrim", text=windows(16), weights="auto", output=output
    ), output


def test_memory_folder_and_plan_agree(made):
    result, output = made
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert torch.equal(logits(result.model, windows(2)), logits(loaded, windows(2)))
    found = inspect_folder(output)
    assert found.target_bytes == sum(e.bytes for e in result.plan.entries)
    assert found.achieved_keep <= 0.3
    stored = {t.name: (t.storage, t.weights, t.rank) for t in found.targets}
    assert stored == {e.name: (e.storage, e.weights, e.rank) for e in result.plan.entries}
    assert Counter(e.weights for e in result.plan.entries).total() == len(found.targets)
    assert any(e.weights != "native" for e in result.plan.entries)


def test_the_report_says_what_was_measured_and_what_plain_rounding_would_lose(made):
    notes = " ".join(made[0].report["notes"])
    assert "a predicted nat was measured as" in notes
    assert "plain GPTQ" in notes


def test_a_run_judges_the_one_yardstick_that_a_survey_of_all_would_name(source):
    options: dict = {"recipe": "spectrim", "text": windows(16)}
    result = api.compress(source, keep=0.6, **options)
    survey = api.survey(source, **options)
    assert all(len(curve.rounding) == len(YARDSTICKS) for curve in survey.curves)
    found = yardstick(survey.curves, result.plan, survey.dtype_bytes)
    assert found is not None
    said = sentence(found, result.plan).split(", this plan")[0]
    assert said in " ".join(result.report["notes"])


def test_the_plan_is_no_worse_than_any_family_alone(made):
    """Predicted: the mixture contains every plan of one family."""
    result, _ = made
    loss = result.plan.predicted_loss
    assert loss is not None
    layers = compressed_layers(result.model)
    assert all(layers[e.name].weights == e.weights for e in result.plan.entries if e.name in layers)
