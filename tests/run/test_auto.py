"""One plan over all forms: exact bytes, codes that stay, and the same model from disk."""

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

import spectrim.storage.quantizer  # noqa: F401  (teaches transformers to load the folders)
from architectures import tiny, windows
from jobs import logits
from spectrim import api
from spectrim.allocate.budget import Shape
from spectrim.allocate.curve import Curve
from spectrim.allocate.ladder import Limits, smallest_keep
from spectrim.allocate.yardstick import YARDSTICKS, sentence, yardstick
from spectrim.errors import BudgetError, RecipeError
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
    options: dict = {"text": windows(16), "weights": "auto", "alike": True, "measure": False}
    return api.compress(source, keep=0.3, recipe="spectrim", output=output, **options), output


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


@pytest.mark.parametrize("weights", ["auto", "int4-g32"])
def test_with_dense_storage_nothing_is_cut_and_servers_read_the_codes(source, tmp_path, weights):
    options: dict = {"recipe": "spectrim", "text": windows(16), "storage": "dense"}
    options["measure"] = False
    with pytest.raises(BudgetError, match="at least"):
        api.compress(source, keep=0.05, weights=weights, **options)
    result = api.compress(source, keep=0.5, weights=weights, output=tmp_path / "out", **options)
    assert all(e.rank is None for e in result.plan.entries)
    assert 0.4 < result.plan.achieved_keep <= 0.5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(result.model, windows(2)), logits(loaded, windows(2)))


def test_what_engines_fuse_is_stored_alike(made):
    forms = {e.name: (e.storage, e.weights) for e in made[0].plan.entries}
    for name, form in forms.items():
        for one, others in (("q_proj", ("k_proj", "v_proj")), ("gate_proj", ("up_proj",))):
            if name.endswith(one):
                assert all(forms[name.replace(one, other)] == form for other in others)


def test_dense_storage_of_native_numbers_is_refused(source):
    with pytest.raises(RecipeError, match="cuts nothing"):
        api.compress(source, keep=0.5, recipe="spectrim", text=windows(2), storage="dense")


def test_the_smallest_keep_without_cuts_is_that_of_the_smallest_format():
    limits = Limits(storage="dense", weights="auto")
    curve = Curve("a", 0, "a", Shape(64, 128, False))
    codes, scales = 64 * 128 * 2 // 8, 64 * 2
    assert smallest_keep([curve], limits) == (codes + scales) / (64 * 128 * 2)
