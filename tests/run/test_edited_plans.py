"""Plans are files that people edit, move and hand on: what they say is held against the model."""

import json

import pytest
import torch

from architectures import tiny, windows
from spectrim import api
from spectrim.cli.plan import plan as plan_command
from spectrim.errors import ArtifactError, BudgetError, InputError

SMALL = {"text": windows(16, 20), "recipe": "svd-llm"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    model = tiny("llama")[0]
    model.save_pretrained(folder / "model")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1
    model.save_pretrained(folder / "sibling")
    api.survey(folder / "model", output=folder / "survey", **SMALL)
    plan_command(folder / "survey", keep=0.6, output=folder / "plan.json", as_json=True)
    return folder


def edited(folder, path, **change):
    content = json.loads((folder / "plan.json").read_text())
    content["entries"][0].update(change)
    path.write_text(json.dumps(content))
    return content["entries"][0]["name"]


@pytest.mark.parametrize(
    "change",
    [{"rank": None, "storage": "dense", "bytes": 1}, {"rank": 3, "bytes": 10**9}, {"bytes": 7}],
)
def test_bytes_are_recounted(folder, tmp_path, change):
    name = edited(folder, tmp_path / "plan.json", **change)
    report = api.compress(
        folder / "model", plan=tmp_path / "plan.json", output=tmp_path / "out", **SMALL
    ).report
    assert report["keep"]["achieved"] == pytest.approx(report["stored"]["achieved_keep"], abs=1e-12)
    assert report["keep"]["target_bytes"]["stored"] == report["stored"]["target_bytes"]
    assert any("recounted" in note and name in note for note in report["notes"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 39}, "the survey holds"),
        ({"rank": 41}, "ranks from 1 to 40"),
        ({"rank": 300, "bytes": 307200}, "ranks from 1 to 40"),
        ({"dense_bytes": 12345}, "another model, dtype or shape"),
    ],
)
def test_impossible_entries_name_their_target(folder, tmp_path, change, reason):
    name = edited(folder, tmp_path / "plan.json", **change)
    with pytest.raises(BudgetError, match=f"{name}.*{reason}|{reason}.*{name}"):
        api.compress(folder / "model", plan=tmp_path / "plan.json", **SMALL)


def test_plans_and_surveys_of_another_model_are_refused_by_name(folder, tmp_path):
    with pytest.raises(ArtifactError, match=r"made for the model .*model .*not for .*sibling"):
        api.compress(folder / "sibling", plan=folder / "plan.json", **SMALL)
    with pytest.raises(ArtifactError, match=r"survey.* of .*model was made for something else"):
        api.compress(folder / "sibling", survey=folder / "survey", **SMALL)
    # Without its survey beside it, a plan still knows its model.
    content = json.loads((folder / "plan.json").read_text())
    (tmp_path / "moved.json").write_text(json.dumps({**content, "survey": "/nowhere"}))
    with pytest.raises(ArtifactError, match="not for"):
        api.compress(folder / "sibling", plan=tmp_path / "moved.json", **SMALL)
    api.compress(folder / "model", plan=tmp_path / "moved.json", **SMALL)


@pytest.mark.parametrize("words", [{"keep": 0.5}, {"size": "1MB"}, {"weights": "int8"}])
def test_a_plan_says_the_sizes_itself(folder, words):
    with pytest.raises((BudgetError, InputError), match=next(iter(words))):
        api.compress(folder / "model", plan=folder / "plan.json", **words, **SMALL)


def test_the_result_carries_the_keep_of_its_plan(folder):
    result = api.compress(folder / "model", plan=folder / "plan.json", **SMALL)
    assert result.recipe.keep == 0.6
    plan = api.plan(folder / "survey", keep=0.8)
    assert api.compress(folder / "model", plan=plan, **SMALL).recipe.keep == 0.8
