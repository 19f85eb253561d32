"""What cannot be decomposed ends in a typed error that names the layer."""

from dataclasses import replace

import pytest
import torch

from spectrim.decompose import OBJECTIVES, decompose
from spectrim.errors import (
    InputError,
    NonFiniteError,
    NotPositiveDefiniteError,
    NumericalError,
    RecipeError,
)

NAME = "model.layers.3.mlp.up_proj"


def every_objective():
    return pytest.mark.parametrize("objective", list(OBJECTIVES))


def test_registry_holds_the_objectives_of_the_recipe():
    from spectrim.recipe import Decompose

    for objective, spec in OBJECTIVES.items():
        fields = Decompose(objective=objective).model_dump()
        for name, option in spec.options.items():
            assert option.default == fields.get(name, option.default), (objective, name)
    assert OBJECTIVES["kfac"].accepted({"shrink_out": 0.1, "alpha": 1}) == {"shrink_out": 0.1}


@every_objective()
def test_needs_are_exactly_what_is_read(objective, make):
    layer = make(6, 8, 20)
    needs = OBJECTIVES[objective].needs
    moments, output = layer.moments, layer.output
    for field in ("C", "shifted", "cross", "absolute"):
        if field not in needs:
            moments = replace(moments, **{field: None})
    if "G" not in needs:
        output = replace(output, G=None)
    if "fisher" not in needs:
        output = replace(output, fisher_in=None, fisher_out=None)
    decompose(objective, layer.W, moments, output, name=NAME)
    for field in needs & {"C", "shifted", "cross", "absolute"}:
        with pytest.raises(InputError, match=f"{NAME}.*{field}"):
            decompose(objective, layer.W, replace(moments, **{field: None}), output, name=NAME)
    if needs & {"G", "fisher"}:
        with pytest.raises(InputError, match=NAME):
            decompose(objective, layer.W, moments, None, name=NAME)


@every_objective()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight_is_named(objective, bad, make):
    layer = make(6, 8, 20)
    layer.W[2, 3] = bad
    with pytest.raises(NonFiniteError, match=f"{NAME}.*weight"):
        decompose(objective, layer.W, layer.moments, layer.output, name=NAME)


@every_objective()
def test_non_finite_statistics_are_named(objective, make):
    layer = make(6, 8, 20)
    for field in OBJECTIVES[objective].needs & {"C", "shifted", "cross", "absolute"}:
        broken = getattr(layer.moments, field).clone()
        broken[0] = float("nan")
        moments = replace(layer.moments, **{field: broken})
        with pytest.raises(NonFiniteError, match=f"{NAME}.*{field}"):
            decompose(objective, layer.W, moments, layer.output, name=NAME)


@every_objective()
@pytest.mark.parametrize("rank", [-1, 7])
def test_rank_outside_the_range_is_refused(objective, rank, make):
    layer = make(6, 8, 20)
    with pytest.raises(ValueError, match=rf"{NAME}.*1\.\.6"):
        decompose(objective, layer.W, layer.moments, layer.output, name=NAME, rank=rank)


def test_wrong_widths_are_refused(make):
    layer, other = make(6, 8, 20), make(6, 9, 20)
    with pytest.raises(ValueError, match="expected width 8"):
        decompose("whitened", layer.W, other.moments, name=NAME)
    with pytest.raises(ValueError, match="expected"):
        decompose("plain", layer.W[0], name=NAME)


def test_a_matrix_that_is_no_moment_is_refused(make):
    layer = make(6, 8, 20)
    skewed = replace(layer.moments, C=layer.moments.C.tril())
    with pytest.raises(NumericalError, match=f"{NAME}.*transpose"):
        decompose("whitened", layer.W, skewed, name=NAME)
    indefinite = replace(layer.output, G=-layer.output.G)
    with pytest.raises(NotPositiveDefiniteError, match=NAME):
        decompose("kfac", layer.W, layer.moments, indefinite, name=NAME)


def test_unknown_names_and_values_are_refused(make):
    layer = make(6, 8, 20)
    with pytest.raises(RecipeError, match="whitened"):
        decompose("whiten", layer.W, layer.moments, name=NAME)
    with pytest.raises(RecipeError, match="blend"):
        decompose("whitened", layer.W, layer.moments, name=NAME, blend=1.0)
    with pytest.raises(InputError, match="blend"):
        decompose("anchored", layer.W, layer.moments, name=NAME, blend=2.0)
    with pytest.raises(InputError, match="alpha"):
        decompose("activation", layer.W, layer.moments, name=NAME, alpha=-1.0)
    with pytest.raises(InputError, match="side"):
        decompose("fisher", layer.W, None, layer.output, name=NAME, side="both")


def test_moments_and_low_precision_weights_are_left_alone(make):
    layer = make(6, 8, 20)
    W = layer.W.to(torch.bfloat16)
    before = {k: v.clone() for k, v in vars(layer.moments).items() if torch.is_tensor(v)}
    moments, kept = layer.moments, W.clone()
    for objective in OBJECTIVES:
        d = decompose(objective, W, moments, layer.output, name=NAME)
        assert d.up.dtype == torch.float64
    assert torch.equal(W, kept)
    for field, value in before.items():
        assert torch.equal(getattr(moments, field), value)


def test_an_option_of_an_objective_alone_is_read_from_its_function():
    from spectrim.recipe import Decompose

    chosen = Decompose(objective="fisher", side="out")
    assert OBJECTIVES["fisher"].accepted(chosen.model_dump()) == {"side": "out"}
    for wrong in ({"objective": "fisher", "side": "up"}, {"objective": "plain", "side": "in"}):
        with pytest.raises(ValueError):
            Decompose(**wrong)
