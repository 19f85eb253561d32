"""Each point of a calibration study is an ordinary run; what is there is not run again."""

from __future__ import annotations

import copy
import csv
import json

import pytest

import spectrim.studies.running as running_module
from architectures import tiny, windows
from spectrim import api, studies
from spectrim.data.windows import given_windows
from spectrim.errors import InputError, TextError
from spectrim.evaluate.perplexity import perplexity

HELD_OUT = windows(6, seed=1)
OPTIONS = {"measure": studies.Measure(text=HELD_OUT), "text": "pool", "window_length": 12}


@pytest.fixture(scope="module")
def dense():
    return tiny("llama")[0]


@pytest.fixture
def pool(monkeypatch):
    """Calibration text as 20 windows: the number and the seed say which of them are taken."""

    def gather(loaded, calibration, text, *, seed, **_):
        if text is not None:
            return given_windows(text)
        if calibration.windows > 20:
            raise TextError(f"20 windows are there, {calibration.windows} were asked for")
        return given_windows(windows(20, seed=9)[seed : seed + calibration.windows])

    monkeypatch.setattr("spectrim.run.opening.gather_windows", gather)


def test_every_point_equals_its_own_run(dense, pool, tmp_path):
    found = studies.calibration_study(
        dense,
        recipes=["svd-llm"],
        windows=[6, 2, 64],
        seeds=[0, 3],
        keep=0.5,
        output=tmp_path,
        **OPTIONS,
    )
    assert [(p.windows, p.seed) for p in found.points] == [(2, 0), (2, 3), (6, 0), (6, 3)]
    for one in found.points:
        ids = windows(20, seed=9)[one.seed : one.seed + one.windows]
        alone = api.compress(copy.deepcopy(dense), recipe="svd-llm", keep=0.5, text=ids)
        assert one.point.nll == pytest.approx(perplexity(alone.model, HELD_OUT).nll, rel=1e-5)
    assert len({p.point.nll for p in found.points}) == 4
    assert list(found.skipped) == [f"svd-llm 64 windows, seed {seed}" for seed in (0, 3)]
    record = json.loads((tmp_path / "calibration.json").read_text())
    assert record["points"] == [one.record() for one in found.points]
    assert len(list(csv.DictReader((tmp_path / "calibration.csv").open()))) == 4
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "calibration.svg").read_text()


def test_a_second_call_measures_only_what_is_new(dense, pool, tmp_path, monkeypatch):
    runs = []
    real = running_module.run_recipe
    monkeypatch.setattr(
        running_module, "run_recipe", lambda *a, **k: runs.append(a[1]) or real(*a, **k)
    )
    options = {"recipes": ["svd-llm"], "keep": 0.5, "output": tmp_path, **OPTIONS}
    studies.calibration_study(dense, windows=[2, 4], **options)
    again = studies.calibration_study(dense, windows=[2, 4, 6], seeds=[0], **options)
    assert [one.calibration.windows for one in runs] == [2, 4, 6]
    assert again.measured == 1 and len(again.points) == 3
    studies.calibration_study(dense, windows=[4], seeds=[0, 1], **options)
    assert [(one.calibration.windows, one.seed) for one in runs[3:]] == [(4, 1)]


def test_what_makes_no_study_is_refused(dense, pool):
    with pytest.raises(InputError, match="needs recipes, numbers of windows, and seeds"):
        studies.calibration_study(dense, recipes=[], **OPTIONS)
    with pytest.raises(InputError, match="numbers from 1"):
        studies.calibration_study(dense, windows=[0], **OPTIONS)
    with pytest.raises(InputError, match="ready windows"):
        studies.calibration_study(dense, **OPTIONS | {"text": HELD_OUT})
    with pytest.raises(InputError, match="two recipes are called 'svd'"):
        studies.calibration_study(dense, recipes=["svd", "svd"], **OPTIONS)
    with pytest.raises(InputError, match="no number of windows could be had"):
        studies.calibration_study(dense, recipes=["svd-llm"], windows=[64], **OPTIONS)
