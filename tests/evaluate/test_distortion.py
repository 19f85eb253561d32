"""Distortion along depth equals what plain hooks on two whole models find."""

from __future__ import annotations

import copy

import pytest
import torch

from architectures import tiny, windows
from spectrim.errors import ModelError
from spectrim.evaluate.distortion import BLOCK, distortion_by_depth, distortion_rows
from spectrim.layers.lowrank import LowRankLinear
from spectrim.model.forward import hidden_of
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module, read_bias, read_weight, replace_module

IDS = windows(5)


def cut(model, rank):
    model = copy.deepcopy(model)
    for target in trace(model, IDS[:1]).targets:
        module = get_module(model, target.name)
        U, s, Vh = torch.linalg.svd(read_weight(module).double(), full_matrices=False)
        layer = LowRankLinear.from_factors(
            U[:, :rank] * s[:rank], Vh[:rank], read_bias(module), dtype=torch.float32, device="cpu"
        )
        replace_module(model, target.name, layer)
    return model


def outputs_by_hooks(model, names):
    """Outputs of named modules in one forward pass over all windows, (tokens, features)."""
    found, handles = {}, []
    for name in names:
        handles.append(
            get_module(model, name).register_forward_hook(
                lambda _m, _a, y, name=name: found.__setitem__(name, hidden_of(y).flatten(0, 1))
            )
        )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_equals_hooks_on_whole_models(architecture):
    dense = tiny(architecture)[0]
    anatomy = trace(dense, IDS[:1])
    models = {"rough": cut(dense, 3), "fine": cut(dense, 20)}
    found = distortion_by_depth(dense, models, IDS, batch=2)
    places = {(b.index, BLOCK): b.name for b in anatomy.blocks}
    places |= {(t.block, t.projection): t.name for t in anatomy.targets}
    expected = outputs_by_hooks(dense, places.values())
    assert len(found) == 2 * len(places)
    others = {name: outputs_by_hooks(model, places.values()) for name, model in models.items()}
    for one in found:
        y = expected[places[one.block, one.projection]].double()
        z = others[one.model][places[one.block, one.projection]].double()
        assert one.mse == pytest.approx(float((y - z).square().mean()), rel=1e-4)
        relative = (y - z).square().sum() / y.square().sum()
        assert one.relative == pytest.approx(float(relative), rel=1e-4)
        cosine = (y * z).sum(-1) / (y.norm(dim=-1) * z.norm(dim=-1))
        assert one.cosine == pytest.approx(float((1 - cosine).mean()), rel=1e-4, abs=1e-7)


def test_a_model_does_not_differ_from_itself_and_is_left_as_it_was():
    dense = tiny("llama")[0].train()
    found = distortion_by_depth(dense, {"same": copy.deepcopy(dense)}, IDS)
    assert max(one.mse for one in found) == 0.0
    assert max(one.cosine for one in found) < 1e-12
    assert dense.training
    assert all(not m._forward_hooks for m in dense.modules())


def test_a_row_holds_every_model_of_a_place():
    dense = tiny("llama")[0]
    found = distortion_by_depth(dense, {"a": cut(dense, 3), "b": cut(dense, 20)}, IDS[:2])
    rows = distortion_rows(found)
    assert [row["block"] for row in rows] == sorted(row["block"] for row in rows)
    last = rows[-1]
    assert last["projection"] == BLOCK
    assert last["a mse"] > last["b mse"] > 0


def test_another_architecture_is_refused():
    with pytest.raises(ModelError, match=r"has no module 'model\.layers"):
        distortion_by_depth(tiny("llama")[0], {"other": tiny("gpt2")[0]}, IDS)
