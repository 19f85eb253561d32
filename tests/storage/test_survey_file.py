"""Surveys on disk: the same after a round trip, and nothing damaged or foreign is believed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from spectrim.allocate.budget import Shape
from spectrim.allocate.curve import Curve
from spectrim.errors import ArtifactError, InputError, OutputError
from spectrim.storage.survey_file import is_survey, load_factors, load_survey, save_survey
from spectrim.storage.survey_record import Factors, Survey, SurveyKey

KEY = SurveyKey(
    model="m" * 64,
    tokenizer="t" * 64,
    windows="w" * 64,
    settings={"decompose.objective": "whitened", "decompose.shrink_in": 0.0},
)


def make():
    rng = np.random.default_rng(0)
    curves, factors, second = [], {}, {}
    for block in range(2):
        for projection, shape in (("attn.q", Shape(8, 6, True)), ("mlp.down", Shape(6, 10))):
            name = f"layers.{block}.{projection}"
            r = min(shape.out_features, shape.in_features)
            energy = np.sort(rng.random(r))[::-1].copy()
            curves.append(
                Curve(
                    name,
                    block,
                    projection,
                    shape,
                    energy,
                    float(energy.sum()),
                    0.0,
                    rng.standard_normal(r),
                    None,
                    (2, 0.125),
                    rounding={"dense int3-g64": rng.random(1), "factored int8": rng.random(r + 1)},
                    group=len(projection) % 3,
                )
            )
            second[name] = np.linspace(1, 0, r + 1)
            factors[name] = Factors(
                torch.randn(shape.out_features, 3), torch.randn(3, shape.in_features)
            )
    return Survey(
        key=KEY,
        model_name="some/model",
        curves=tuple(curves),
        losses={"second_order": second},
        dtype_bytes=2,
        other_bytes=1234,
        recipe={"name": "svd-llm"},
        facts={"seconds": {"survey": 1.5}},
        table={("layers.0.attn.q", 0.4): 17.5},
        notes=("a note",),
        factors=factors,
    )


def test_a_round_trip_changes_nothing(tmp_path):
    survey = make()
    save_survey(survey, tmp_path / "s")
    assert is_survey(tmp_path / "s") and not is_survey(tmp_path)
    found = load_survey(tmp_path / "s")
    for field in (
        "key",
        "model_name",
        "dtype_bytes",
        "other_bytes",
        "recipe",
        "facts",
        "table",
        "notes",
    ):
        assert getattr(found, field) == getattr(survey, field), field
    assert found.scores == ("energy", "first_order", "second_order", "measured")
    for one, other in zip(found.curves, survey.curves, strict=True):
        for field in dataclasses.fields(Curve):
            np.testing.assert_equal(getattr(one, field.name), getattr(other, field.name))
        np.testing.assert_equal(
            found.losses["second_order"][one.name], survey.losses["second_order"][one.name]
        )
        factors = load_factors(found, one.name)
        assert torch.equal(factors.up, survey.factors[one.name].up)
        assert torch.equal(factors.down, survey.factors[one.name].down)


def test_a_score_that_was_not_made_is_named():
    survey = make()
    assert survey.curves_for("second_order")[0].loss is not None
    assert survey.curves_for("energy")[0].loss is None
    with pytest.raises(InputError, match="no score 'kfac'; it has energy, first_order"):
        survey.curves_for("kfac")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "x"}, ["model"]),
        ({"tokenizer": "x", "windows": "y"}, ["tokenizer", "windows"]),
        (
            {"settings": {"decompose.objective": "plain"}},
            ["decompose.objective", "decompose.shrink_in"],
        ),
    ],
)
def test_a_survey_of_something_else_is_refused_with_the_differing_fields(changes, named):
    survey, other = make(), KEY.model_copy(update=changes)
    survey.check(KEY)
    assert KEY.differences(other) == named
    with pytest.raises(ArtifactError, match=", ".join(named)):
        survey.check(other)
    survey.check(other, ignore=tuple(named))


def test_an_existing_folder_is_kept_unless_it_may_be_replaced(tmp_path):
    save_survey(make(), tmp_path / "s")
    with pytest.raises(OutputError, match="exists"):
        save_survey(make(), tmp_path / "s")
    save_survey(make(), tmp_path / "s", overwrite=True)


def test_a_survey_without_key_or_factors_cannot_be_saved(tmp_path):
    for missing in ("key", "factors"):
        with pytest.raises(ArtifactError, match="key and factors"):
            save_survey(dataclasses.replace(make(), **{missing: None}), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def edit(folder, change):
    path = folder / "survey.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format_version=2), "format_version 2"),
        (lambda d: d.update(unknown=1), "unknown"),
        (lambda d: d.pop("key"), "key"),
        (lambda d: d["targets"][0].update(out_features=0), "out_features"),
        (lambda d: d["targets"][0].update(out_features=10**12), "out_features"),
        (lambda d: d["targets"][0].update(total=-1.0), "total"),
        (lambda d: d["targets"][0].update(name="elsewhere"), "elsewhere"),
        (lambda d: d["targets"][0].update(in_features=4), "6 energies for at most 4"),
        (lambda d: d.update(targets=[]), "targets"),
        (lambda d: d.update(scores=["first_order"]), "scores"),
        (lambda d: d.update(scores=["kfac"]), "kfac"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, change, message):
    save_survey(make(), tmp_path / "s")
    edit(tmp_path / "s", change)
    with pytest.raises(ArtifactError, match=message):
        load_survey(tmp_path / "s")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.full(6, np.nan), "not finite"),
        (np.zeros(5), "expected"),
        (np.zeros((6, 1)), "expected"),
        (np.zeros(6, dtype=np.float32), "fp64"),
    ],
)
def test_damaged_numbers_are_refused(tmp_path, value, message):
    save_survey(make(), tmp_path / "s")
    arrays = load_file(tmp_path / "s" / "curves.safetensors")
    arrays["layers.0.attn.q.score"] = value
    save_file(arrays, tmp_path / "s" / "curves.safetensors")
    with pytest.raises(ArtifactError, match=message):
        load_survey(tmp_path / "s")


def test_losses_of_rounding_are_of_one_matrix_or_by_rank(tmp_path):
    save_survey(make(), tmp_path / "s")
    arrays = load_file(tmp_path / "s" / "curves.safetensors")
    arrays["layers.0.attn.q.rounding factored int8"] = np.zeros(3)
    save_file(arrays, tmp_path / "s" / "curves.safetensors")
    with pytest.raises(ArtifactError, match="3 losses of rounding to 'factored int8'"):
        load_survey(tmp_path / "s")


def test_truncated_and_missing_files_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no survey"):
        load_survey(tmp_path)
    save_survey(make(), tmp_path / "s")
    factors = tmp_path / "s" / "factors.safetensors"
    found = load_survey(tmp_path / "s")
    with pytest.raises(ArtifactError, match="nothing"):
        load_factors(found, "nothing")
    factors.write_bytes(factors.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="factors"):
        load_factors(found, "layers.0.attn.q")
    curves = tmp_path / "s" / "curves.safetensors"
    curves.write_bytes(curves.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match="curves"):
        load_survey(tmp_path / "s")


def test_factors_of_another_shape_are_refused(tmp_path):
    survey = make()
    survey.factors["layers.0.attn.q"] = Factors(torch.zeros(8, 3), torch.zeros(3, 7))
    save_survey(survey, tmp_path / "s")
    with pytest.raises(ArtifactError, match="sizes"):
        load_factors(load_survey(tmp_path / "s"), "layers.0.attn.q")
