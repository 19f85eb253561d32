"""A size alone leaves the choice of forms to the plan; whoever says more gets what was said."""

import pytest
import torch

from architectures import tiny, windows
from spectrim import api
from spectrim.errors import BudgetError, RecipeError, TextError
from spectrim.formats.grouped import Grouped
from spectrim.formats.int8 import Int8
from spectrim.recipes import get_recipe
from spectrim.storage.inspect import inspect_folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny("llama")[0].to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def kernels(monkeypatch):
    """A device that multiplies int8 and four bits in groups of 64, whatever this one does."""
    monkeypatch.setattr(Int8, "fast", lambda self, device, dtype: True)
    monkeypatch.setattr(Grouped, "fast", lambda self, *_: (self.bits, self.group) == (4, 64))


def test_a_size_alone_takes_what_the_device_multiplies_fast(source, kernels, tmp_path):
    whole = inspect_folder(source).bytes
    size, options = int(0.75 * whole), {"text": windows(16), "measure": False}
    free = api.compress(source, size=size, output=tmp_path / "out", **options)
    formats = {name for e in free.plan.entries for name in e.weights.split("+")}
    assert formats <= {"native", "int8", "int4-g64"} and formats - {"native"}
    assert inspect_folder(tmp_path / "out").bytes <= size
    assert "int8, int4-g64, which cpu multiplies" in " ".join(free.report["notes"])
    said = api.compress(source, size=size, weights="native", **options)
    assert {e.weights for e in said.plan.entries} == {"native"}
    assert said.plan.predicted_loss >= free.plan.predicted_loss


def test_without_fast_formats_a_size_cuts(source, monkeypatch):
    for kind in (Int8, Grouped):
        monkeypatch.setattr(kind, "fast", lambda self, device, dtype: False)
    size = int(0.75 * inspect_folder(source).bytes)
    found = api.compress(source, size=size, text=windows(8), measure=False)
    assert {e.weights for e in found.plan.entries} == {"native"}


def test_a_keep_out_of_reach_is_refused_before_any_text_is_read(source, monkeypatch):
    monkeypatch.setattr("spectrim.run.opening.gather_windows", None)
    for recipe in ("spectrim", "svd-llm"):
        with pytest.raises(BudgetError, match=r"keep 0.02 cannot be reached: .* keep 0.[01]"):
            api.compress(source, recipe=recipe, keep=0.02, text=windows(8))
    with pytest.raises(BudgetError, match=r"keep 1\.000000"):
        api.compress(source, keep=0.5, multiple=4096, text=windows(8))


@pytest.mark.parametrize("words", [{"text": "no.txt"}, {"evaluation_text": "no.txt"}])
def test_a_text_that_is_not_there_is_refused_before_the_model_is_loaded(words):
    with pytest.raises(TextError, match=r"'no.txt' is neither an existing file"):
        api.compress("no/such/model", keep=0.5, **words)


def test_patterns_of_formats_are_checked():
    with pytest.raises(RecipeError, match="fits no format"):
        get_recipe("spectrim").with_changes(storage={"formats": ("int9*",)})
