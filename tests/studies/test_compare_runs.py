"""The comparison measures saved results, marks the best and its equals, and survives failures."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch

import spectrim.studies.comparison as compare_module
from architectures import tiny, windows
from spectrim import api, studies
from spectrim.data.sampling import sampled_tokens
from spectrim.errors import InputError
from spectrim.evaluate.perplexity import perplexity
from spectrim.report.tables import comparison_csv, comparison_markdown
from spectrim.run.loading import load_model

HELD_OUT = windows(8, seed=1)
MEASURE = studies.Measure(text=HELD_OUT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("compare") / "dense"
    tiny("llama")[0].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def compared(folder, tmp_path_factory):
    """svd twice under different names, and once with a recipe that fails."""
    outputs = {}

    def in_this_process(model, recipe, output, options):
        if recipe.name == "broken":
            raise InputError("it | broke")
        api.compress(model, recipe=recipe, output=output)
        outputs[recipe.name, recipe.keep] = perplexity(load_model(output).model, HELD_OUT).nll

    recipes = [
        api.resolve_recipe("svd"),
        api.resolve_recipe("svd").with_changes(name="twin", seed=1),
        api.resolve_recipe("svd").with_changes(name="broken"),
    ]
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_module, "_compress_alone", in_this_process)
        options = {"measure": MEASURE, "output": out}
        first = studies.compare(folder, recipes=recipes[:2], keep=[0.8], **options)
        assert len(outputs) == 2
        found = studies.compare(folder, recipes=recipes, keep=[0.8, 0.4], **options)
    assert [e.point for e in first.entries] == [e.point for e in found.entries[:2]]
    return found, outputs, out


def test_numbers_are_those_of_the_saved_results(compared):
    found, outputs, _ = compared
    assert [(e.point.recipe, e.point.keep) for e in found.entries] == [
        ("svd", 0.8),
        ("twin", 0.8),
        ("svd", 0.4),
        ("twin", 0.4),
    ]
    for entry in found.entries:
        expected = outputs[entry.point.recipe, entry.point.keep]
        assert entry.point.nll == pytest.approx(expected, rel=1e-6)
        assert entry.point.peak_bytes > 10**7


def test_each_size_has_one_best_and_its_equal_is_within_noise(compared):
    found = compared[0]
    assert [e.best for e in found.entries] == [True, False] * 2
    assert all(e.within_noise for e in found.entries)


def test_a_clear_difference_is_no_noise(folder):
    # What the model itself would say is likelier under it than under any other.
    steps = sampled_tokens(tiny("llama")[0], windows(8, 2), steps=10, chances=None)
    text = torch.cat([windows(8, 2), torch.stack(list(steps), 1)], 1)
    reference = studies.Measure(text=text).reference(folder)
    size = compare_module.Size(0.5, 5, 10, 20, 10)
    good = reference.measure(reference.loaded.model, size, recipe="good", seconds=1.0)
    bad = reference.measure(tiny("mistral")[0], size, recipe="bad", seconds=1.0)
    ranked = compare_module._ranked([bad, good], reference)
    assert [(e.best, e.within_noise) for e in ranked] == [(False, False), (True, True)]


def test_a_failed_run_is_named_in_every_file(compared):
    found, _, out = compared
    assert found.failed == {"broken 0.8": "it | broke", "broken 0.4": "it | broke"}
    record = json.loads((out / "compare.json").read_text())
    assert record["failed"] == found.failed
    text = (out / "compare.md").read_text()
    assert text == comparison_markdown(record)
    assert "**svd**" in text and "| twin |" in text and "it \\| broke" in text
    rows = list(csv.DictReader(io.StringIO(comparison_csv(record))))
    assert [row["recipe"] for row in rows] == ["svd", "twin"] * 2


def test_what_cannot_be_compared_is_refused(folder):
    with pytest.raises(InputError, match="folder or hub name"):
        studies.compare(tiny("llama")[0], recipes=["svd"])
    with pytest.raises(InputError, match="needs recipes"):
        studies.compare(folder, recipes=[])
    with pytest.raises(InputError, match="names or files"):
        studies.compare(folder, recipes=["svd"], text=windows(2))
