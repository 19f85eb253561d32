import pytest
import torch
from torch import nn

from spectrim.layers.arrange import arrange
from spectrim.layers.fusion import fuse, unfuse
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def model_of(kind, m, n, k, dtype):
    layers = [
        kind.from_factors(draw(m, k), draw(k, n, seed=1), None, dtype=dtype, device="cpu")
        for _ in range(2)
    ]
    return nn.ModuleList([*layers, nn.Linear(n, m)])


def columns(model):
    return [n for n, p in model.named_parameters() if p.ndim == 2 and not p.is_contiguous()]


@pytest.mark.parametrize("kind", [LowRankLinear, PackedLinear])
@pytest.mark.parametrize(("m", "n"), [(30, 50), (50, 30)])
def test_only_strides_change(kind, m, n):
    model = model_of(kind, m, n, 8, torch.float32)
    x = draw(4, n, seed=2)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = [layer(x) for layer in model]
    assert arrange(model) == len(columns(model)) == 2
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    for layer, y in zip(model, expected, strict=True):
        assert torch.allclose(layer(x), y, rtol=1e-5, atol=1e-5)
    assert arrange(model) == 2


def test_only_tall_factors_of_compressed_layers_are_stored_by_columns():
    model = model_of(LowRankLinear, 30, 20, 8, torch.float32)
    arrange(model)
    assert columns(model) == ["0.up.weight", "1.up.weight"]
    assert model[0].up.weight.mT.is_contiguous()


def test_a_change_of_dtype_is_undone_by_arranging_again():
    model = model_of(LowRankLinear, 30, 20, 8, torch.float32)
    arrange(model)
    model.to(torch.bfloat16)
    assert arrange(model) == 0
    assert columns(model) == []


def test_arranged_layers_train_and_fuse():
    model = model_of(LowRankLinear, 30, 20, 8, torch.float32)
    fuse(model, [("0", "1")])
    assert arrange(model) == 2
    (model[0](draw(4, 20)) + model[1](draw(4, 20))).sum().backward()
    assert model[0].up.weight.grad.shape == (30, 8)
    unfuse(model)
    assert arrange(model) == 2
