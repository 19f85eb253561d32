"""Layer errors are those of plain forwards, anchored promises hold, finished runs are reused."""

from __future__ import annotations

import copy
import csv
import json

import pytest
import torch

import spectrim.studies.running as running_module
from architectures import BLOCKS, tiny, windows
from spectrim import api, studies
from spectrim.errors import InputError
from spectrim.model.weights import get_module
from spectrim.studies.depth import objective_recipe

CALIBRATION = windows(8)
HELD_OUT = windows(6, seed=1)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("depth") / "dense"
    tiny("llama")[0].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drawn(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layers")
    options = {"measure": studies.Measure(text=CALIBRATION), "text": CALIBRATION, "keep": 0.5}
    found = studies.layer_errors(
        dense, objectives=studies.PUBLISHED_OBJECTIVES, output=folder, **options
    )
    return folder, found, options


def output_of(model, name, ids):
    kept = []
    handle = get_module(model, name).register_forward_hook(lambda m, a, y: kept.append(y))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return kept[0].double()


def test_every_error_is_that_of_plain_forward_passes(dense, drawn):
    original = tiny("llama")[0]
    recipe = objective_recipe("whitened").with_changes(keep=0.5)
    result = api.compress(copy.deepcopy(original), recipe=recipe, text=CALIBRATION)
    told = {t["name"]: t for t in result.report["targets"]}
    mine = [e for e in drawn[1] if e.model == "whitened"]
    assert len(mine) == len(told) == BLOCKS * 7
    for one in mine:
        name = f"model.layers.{one.block}.{one.projection}"
        y, other = (output_of(m, name, CALIBRATION) for m in (original, result.model))
        expected = float((y - other).square().sum() / y.square().sum())
        assert one.held_out == pytest.approx(expected, rel=1e-3)
        assert one.predicted == pytest.approx(told[name]["predicted_error"], rel=1e-6)
        assert one.calibrated == pytest.approx(told[name]["measured_error"], rel=1e-4)


def test_only_the_anchored_objective_knows_what_a_layer_costs_in_the_network(drawn):
    # Measured on the calibration windows themselves, so that no new text comes between.
    def gap(model):
        mine = [e for e in drawn[1] if e.model == model]
        return max(abs(e.held_out / e.predicted - 1) for e in mine)

    others = [gap(name) for name in ("plain", "whitened", "shifted")]
    assert gap("anchored") < min(others) and min(others) > 0.2
    # To the digit where nothing holds the map back: a ridge is paid for in what is predicted.
    recipe = objective_recipe("anchored").with_changes(keep=0.5, decompose={"ridge": 1e-6})
    told = api.compress(tiny("llama")[0], recipe=recipe, text=CALIBRATION).report["targets"]
    assert max(abs(t["measured_error"] / t["predicted_error"] - 1) for t in told) < 1e-3


def test_files_hold_the_errors_and_a_second_call_runs_nothing(dense, drawn, monkeypatch):
    folder, found, options = drawn
    record = json.loads((folder / "layer_errors.json").read_text())
    assert record["errors"] == [one.record() for one in found]
    assert set(record["keep"]) == set(studies.PUBLISHED_OBJECTIVES)
    assert len(list(csv.DictReader((folder / "layer_errors.csv").open()))) == len(found)
    assert (folder / "layer_errors.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "layer_errors.svg").read_text()
    runs = []
    real = running_module.run_recipe
    monkeypatch.setattr(
        running_module, "run_recipe", lambda *a, **k: runs.append(a[1].name) or real(*a, **k)
    )
    chosen = {"objectives": ("plain", "anchored"), "output": folder, **options}
    again = studies.layer_errors(dense, **chosen)
    assert again == [e for e in found if e.model in ("plain", "anchored")]
    assert runs == []
    # The picture along depth takes up the same runs.
    blocks = studies.distortion(dense, **chosen)
    assert runs == [] and {one.model for one in blocks} == {"plain", "anchored"}
    damaged = min((folder / "points").glob("*.json"))
    damaged.write_text('{"name": 3}')
    studies.layer_errors(dense, objectives=studies.PUBLISHED_OBJECTIVES, output=folder, **options)
    assert len(runs) == 1


def test_folders_stand_beside_recipes_and_names_must_differ(dense, drawn, tmp_path):
    api.compress(dense, recipe="svd", keep=0.5, output=tmp_path / "small")
    measure = studies.Measure(text=HELD_OUT)
    options = {"measure": measure, "keep": 0.5}
    found = studies.layer_errors(dense, [tmp_path / "small"], recipes=["svd"], **options)
    both = {name: [e for e in found if e.model == name] for name in ("small", "svd")}
    for one, other in zip(both["small"], both["svd"], strict=True):
        assert one.predicted == pytest.approx(other.predicted, rel=1e-6)
        assert one.held_out > 0
    # A dense model has no report: nothing was predicted, and nothing departs from it.
    own = studies.layer_errors(dense, [dense], measure=measure)
    assert {(e.predicted, e.held_out) for e in own} == {(None, 0.0)}
    with pytest.raises(InputError, match="different names, found svd, svd"):
        studies.layer_errors(dense, recipes=["svd", "svd"], measure=measure)
    with pytest.raises(InputError, match="found none"):
        studies.distortion(dense, measure=measure)
    with pytest.raises(InputError, match="'nearest'"):
        studies.layer_errors(dense, objectives=["nearest"], measure=measure)
