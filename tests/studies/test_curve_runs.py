"""The curve measures what single runs give, keeps its points, and goes on where it was."""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch

import spectrim.studies.rates as curve_module
import spectrim.studies.running as running_module
from architectures import tiny, windows
from quick_recipes import FEW_STEPS
from spectrim import api, studies
from spectrim.errors import InputError
from spectrim.evaluate.agreement import agreement
from spectrim.evaluate.perplexity import perplexity
from spectrim.formats import format_of
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module
from spectrim.recipes import get_recipe

CALIBRATION = windows(8)
HELD_OUT = windows(6, seed=1)
MEASURE = studies.Measure(text=HELD_OUT)
ACIP = {"learn": FEW_STEPS}


@pytest.fixture(scope="module")
def dense():
    return tiny("llama")[0]


@pytest.fixture(scope="module")
def drawn(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("curve")
    found = studies.curve(
        dense,
        recipes=["svd", "svd-llm"],
        keep=[0.8, 0.4],
        measure=MEASURE,
        text=CALIBRATION,
        output=folder,
    )
    return folder, found


def test_every_point_equals_its_own_run(dense, drawn):
    before = perplexity(dense, HELD_OUT).nll
    for point in drawn[1].points:
        model = copy.deepcopy(dense)
        result = api.compress(model, recipe=point.recipe, keep=point.keep, text=CALIBRATION)
        alone = perplexity(result.model, HELD_OUT)
        assert point.nll == pytest.approx(alone.nll, rel=1e-5)
        assert point.excess == pytest.approx(alone.nll - before, abs=1e-5)
        assert point.excess_low <= point.excess <= point.excess_high
        assert point.kl == pytest.approx(agreement(dense, result.model, HELD_OUT).kl, rel=1e-3)
        assert point.achieved == pytest.approx(result.plan.achieved_keep)
        assert point.bits_per_weight == pytest.approx(32 * point.achieved, rel=1e-6)
        assert point.model_bytes == result.report["keep"]["model_bytes"]["stored"]


def test_the_dense_model_is_left_as_it_was(dense, drawn):
    fresh = tiny("llama")[0].state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in dense.state_dict().items())


def test_files_hold_the_points(drawn):
    folder, found = drawn
    record = json.loads((folder / "curve.json").read_text())
    assert record["points"] == [point.record() for point in found.points]
    assert record["dense"]["protocol"]["windows"] == 6
    assert len(list(csv.DictReader((folder / "curve.csv").open()))) == 4
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "curve.svg").read_text()
    assert len(list((folder / "points").glob("*.json"))) == 4


def test_a_second_call_measures_only_what_is_new(dense, drawn, tmp_path, monkeypatch):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "points").mkdir()
    for path in (drawn[0] / "points").iterdir():
        (folder / "points" / path.name).write_bytes(path.read_bytes())
    damaged = sorted((folder / "points").iterdir())[0]
    damaged.write_text('{"point": 3')
    runs = []
    real = running_module.run_recipe
    monkeypatch.setattr(
        running_module, "run_recipe", lambda *a, **k: runs.append(a[1].name) or real(*a, **k)
    )
    options = {"measure": MEASURE, "text": CALIBRATION, "output": folder}
    again = studies.curve(dense, recipes=["svd", "svd-llm"], keep=[0.8, 0.4], **options)
    assert len(runs) == again.measured == 1
    numbers = [(p.recipe, p.keep, p.nll) for p in again.points]
    assert numbers == [(p.recipe, p.keep, pytest.approx(p.nll, rel=1e-9)) for p in drawn[1].points]
    studies.curve(dense, recipes=["svd"], keep=[0.8, 0.6], **options)
    assert runs[1:] == ["svd"]
    studies.curve(dense, recipes=["svd-llm"], keep=[0.8], **options | {"text": windows(8, seed=5)})
    assert runs[2:] == ["svd-llm"]


def test_one_survey_serves_all_sizes(dense, monkeypatch):
    surveys = []
    real = curve_module.make_survey
    monkeypatch.setattr(
        curve_module, "make_survey", lambda *a, **k: surveys.append(1) or real(*a, **k)
    )
    studies.curve(
        dense, recipes=["svd-llm"], keep=[0.8, 0.6, 0.4], measure=MEASURE, text=CALIBRATION
    )
    assert len(surveys) == 1


def test_one_training_serves_all_sizes_of_a_learned_recipe(dense, tmp_path, monkeypatch):
    recipe = get_recipe("acip").with_changes(**ACIP)
    runs = []
    real = running_module.run_recipe
    monkeypatch.setattr(
        running_module, "run_recipe", lambda *a, **k: runs.append(k["work"].path) or real(*a, **k)
    )
    options = {"measure": MEASURE, "text": CALIBRATION, "output": tmp_path}
    found = studies.curve(dense, recipes=[recipe], keep=[0.8, 0.6, 0.1], **options)
    assert len(runs) == 1
    assert list(found.skipped) == ["acip 0.1"]
    for point in found.points:
        alone = api.compress(copy.deepcopy(dense), recipe=recipe, keep=point.keep, text=CALIBRATION)
        assert point.nll == pytest.approx(perplexity(alone.model, HELD_OUT).nll, rel=1e-4)
        assert point.achieved == pytest.approx(alone.plan.achieved_keep)
        assert point.model_bytes == alone.report["keep"]["model_bytes"]["stored"]
    # A further size finds the training's checkpoint; known sizes need neither.
    more = studies.curve(dense, recipes=[recipe], keep=[0.8, 0.6], **options)
    assert more.measured == 0 and len(runs) == 1
    studies.curve(dense, recipes=[recipe], keep=[0.7], **options)
    assert len(runs) == 2 and runs[0] == runs[1] and runs[0].is_dir()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_dense_model_in_integers_is_the_rounded_dense_model(name, tmp_path):
    dense = tiny(name)[0]
    found = studies.curve(
        dense,
        recipes=["svd"],
        keep=[0.5],
        formats=["int8", "int4"],
        measure=MEASURE,
        output=tmp_path,
    )
    points = {p.recipe: p for p in found.points}
    assert list(points) == ["svd", "dense int8", "dense int4"]
    for weights in ("int8", "int4"):
        model = copy.deepcopy(dense)
        bits = rows = 0
        for target in trace(model, HELD_OUT[:1, :8]).targets:
            module = get_module(model, target.name)
            W = module.weight.data.T if target.transposed else module.weight.data
            groups = -(-W.shape[1] // 32)
            eight = weights == "int8"
            bits += 8 * W.numel() if eight else 4 * 32 * groups * W.shape[0]
            bits += 32 * W.shape[0] * (1 if eight else groups) + 32 * W.shape[0] * target.bias
            rows += W.numel()
            row = format_of(weights)
            W.copy_(row.decode(row.encode(W, dtype=W.dtype), W.shape[1]))
        expected = perplexity(model, HELD_OUT).nll
        point = points[f"dense {weights}"]
        assert point.nll == pytest.approx(expected, rel=1e-5)
        assert point.bits_per_weight == pytest.approx(bits / rows)
        assert point.excess_low <= point.excess <= point.excess_high
    assert points["dense int8"].kl < points["dense int4"].kl < points["svd"].kl
    with pytest.raises(InputError, match="int2"):
        studies.curve(dense, recipes=["svd"], keep=[0.5], formats=["int2"], measure=MEASURE)


def test_what_makes_no_curve_is_refused(dense, tmp_path):
    with pytest.raises(InputError, match="needs recipes"):
        studies.curve(dense, measure=MEASURE)
    with pytest.raises(InputError, match="two recipes are called 'svd'"):
        studies.curve(dense, recipes=["svd", "svd"], measure=MEASURE, output=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(InputError, match="no size could be measured"):
        studies.curve(dense, recipes=["svd"], keep=[1e-6], measure=MEASURE)
