import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spectrim.errors import ArtifactError, ModelError
from spectrim.layers.layout import LAYERS, layout_of
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.swap import (
    compressed_layers,
    dense_shape,
    is_compressed,
    restore_dense,
    swap_in,
)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(out=7, n=5, k=3, *, bias=True, dtype=torch.float64):
    b = draw(out, seed=2) if bias else None
    return LowRankLinear.from_factors(
        draw(out, k), draw(k, n, seed=1), b, dtype=dtype, device="cpu"
    )


@pytest.mark.parametrize("bias", [True, False])
def test_forward_is_the_dense_product(bias):
    layer = built(bias=bias)
    x = draw(2, 4, 5, seed=3)
    expected = x @ (draw(7, 3) @ draw(3, 5, seed=1)).T + (draw(7, seed=2) if bias else 0)
    assert torch.allclose(layer(x), expected, atol=1e-12)
    assert torch.allclose(layer.dense_weight(), draw(7, 3) @ draw(3, 5, seed=1), atol=1e-12)


def test_factors_are_rounded_once_and_copied():
    up, down = draw(7, 3), draw(3, 5, seed=1)
    layer = LowRankLinear.from_factors(up, down, None, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(layer.up.weight, up.to(torch.bfloat16))
    same = LowRankLinear.from_factors(up, down, None, dtype=torch.float64, device="cpu")
    up.zero_()
    assert same.up.weight.abs().sum() > 0
    assert layer.dense_weight().dtype == torch.float32


def test_building_consumes_no_randomness():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    built()
    assert torch.equal(torch.rand(1), expected)


def test_factors_that_do_not_chain_are_refused():
    with pytest.raises(ValueError, match="are not"):
        LowRankLinear.from_factors(draw(7, 3), draw(4, 5), None, dtype=torch.float32, device="cpu")


def test_the_layout_describes_the_layer():
    for bias in (True, False):
        layer = LowRankLinear.empty(5, 7, 3, bias)
        shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
        assert shapes == LAYERS["factored"].tensors(7, 5, 3, bias)
        assert all(p.is_meta for p in layer.parameters())


@pytest.mark.parametrize("kind", [k for k, row in LAYERS.items() if row.low_rank])
def test_the_stored_weight_never_has_the_dense_shape(kind):
    layout = layout_of(kind, "int8+native" if LAYERS[kind].whole else "native")
    assert layout.told_apart
    for m, n in [(6, 6), (4, 9), (9, 4)]:
        for k in range(1, min(m, n)):
            tensors = layout.tensors(m, n, k, True)
            stored = tensors[layout.weight_key]
            assert stored not in {(m, n), (n, m)}
            disk = {layout.disk_key(key): shape for key, shape in tensors.items()}
            assert disk["weight"] == stored
            assert disk["bias"] == (m,)
            if not layout.states_shape:
                assert layout.dimensions(disk) == (m, n, k)


def test_an_unknown_storage_names_the_known_ones():
    with pytest.raises(ArtifactError, match="factored"):
        layout_of("zipped")


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7))
        self.b = Conv1D(7, 5)


@pytest.mark.parametrize("name", ["a.0", "b"])
def test_swap_and_back(name):
    model = Toy().double().eval()
    old = model.get_submodule(name)
    W = draw(7, 3) @ draw(3, 5, seed=1)
    assert dense_shape(old, name) == (7, 5)
    assert swap_in(model, name, built()) is old
    assert list(compressed_layers(model)) == [name]
    layer = model.get_submodule(name)
    assert not layer.training
    x = draw(4, 5, seed=3)
    expected = layer(x)
    dense = restore_dense(model, name)
    assert type(dense) is type(old)
    assert dense.weight.shape == old.weight.shape
    assert torch.allclose(dense(x), expected, atol=1e-12)
    assert torch.allclose(dense.weight if name == "a.0" else dense.weight.T, W, atol=1e-12)
    assert not is_compressed(dense)
    assert not compressed_layers(model)


def test_a_refit_replaces_a_compressed_layer():
    model = Toy().double()
    swap_in(model, "b", built())
    swap_in(model, "b", built(k=2))
    assert compressed_layers(model)["b"].transposed
    assert compressed_layers(model)["b"].rank == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.9", "has no module"), ("a.1", "LayerNorm"), ("nothing.here", "has no module")],
)
def test_names_that_are_no_linear_layers_are_refused(name, message):
    with pytest.raises(ModelError, match=message):
        swap_in(Toy(), name, built())


def test_another_shape_is_refused():
    with pytest.raises(ModelError, match=r"a\.0 maps 5 features to 7"):
        swap_in(Toy(), "a.0", built(out=8))
