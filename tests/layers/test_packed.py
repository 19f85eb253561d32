import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spectrim.layers.layout import layout_of
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.swap import restore_dense, swap_in
from spectrim.linalg.pivot import pack


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(m, n, k):
    return draw(m, k, seed=1), draw(k, n, seed=2)


def built(m, n, k, *, bias=True, dtype=torch.float64, kind=PackedLinear):
    b = draw(m, seed=3) if bias else None
    return kind.from_factors(*factors(m, n, k), b, dtype=dtype, device="cpu")


@given(m=st.integers(1, 20), n=st.integers(1, 20), bias=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_packed_equals_factored(m, n, bias, data):
    k = data.draw(st.integers(1, min(m, n)))
    shape = data.draw(st.sampled_from([(n,), (3, n), (2, 4, n), (0, n)]))
    x = draw(*shape, seed=4)
    expected = built(m, n, k, bias=bias, kind=LowRankLinear)(x)
    found = built(m, n, k, bias=bias)(x)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-10 * max(expected.norm(), 1e-30)


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12), (20, 20)])
@pytest.mark.parametrize("k", [1, 5, 11])
def test_stored_numbers(m, n, k):
    layer = built(m, n, k, bias=False)
    assert sum(p.numel() for p in layer.parameters()) == k * (m + n - k)
    assert layer.order.numel() == min(m, n)
    assert layer.order.dtype == torch.int32
    assert [name for name, _ in layer.named_buffers()] == ["order"]


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12), (20, 20)])
@pytest.mark.parametrize("bias", [True, False])
def test_tensors_are_those_of_the_layout(m, n, bias):
    layout = layout_of("packed")
    assert layout.layer_class() is PackedLinear
    for k in (1, 7, 12):
        layer = built(m, n, k, bias=bias)
        shapes = {key: tuple(t.shape) for key, t in layer.state_dict().items()}
        assert shapes == layout.tensors(m, n, k, bias)
        assert layout.sides(shapes) == (m, n, k)
        assert shapes[layout.weight_key] != (m, n) or k == min(m, n)


@given(m=st.integers(1, 12), n=st.integers(1, 12), data=st.data())
@settings(max_examples=60, deadline=None)
def test_shapes_tell_side_and_rank(m, n, data):
    k = data.draw(st.integers(1, min(m, n)))
    layout = layout_of("packed")
    assert layout.sides(layout.tensors(m, n, k, False)) == (m, n, k)


@pytest.mark.parametrize(("m", "n"), [(96, 160), (160, 96)])
def test_fp32_reload_equals_the_factored_model(m, n):
    layer = built(m, n, 40, dtype=torch.float32)
    fresh = PackedLinear.empty(n, m, 40, True, dtype=torch.float32)
    assert {p.device.type for p in fresh.state_dict().values()} == {"meta"}
    fresh.load_state_dict(layer.state_dict(), assign=True)
    x = draw(9, n, seed=5)
    expected = built(m, n, 40, kind=LowRankLinear)(x)
    assert (fresh(x.float()).double() - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12)])
def test_gradients_match_the_dense_layer(m, n):
    layer = built(m, n, 5)
    x = draw(4, n, seed=5).requires_grad_()
    weights = draw(4, m, seed=6)
    (layer(x) * weights).sum().backward()
    assert torch.allclose(x.grad, weights @ layer.dense_weight(), atol=1e-11)
    assert torch.allclose(layer.bias.grad, weights.sum(0))
    assert layer.basis.weight.grad.abs().sum() > 0
    assert layer.coefficients.weight.grad.abs().sum() > 0


def test_dtype_changes_leave_the_order_alone():
    layer = built(12, 30, 5)
    x = draw(4, 30, seed=5)
    expected = layer(x)
    layer.to(torch.bfloat16)
    assert layer.order.dtype == torch.int32
    assert torch.allclose(layer(x.bfloat16()).double(), expected, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12)])
def test_swapped_in_and_restored(m, n):
    model = nn.Sequential(nn.Linear(n, m).double())
    layer = built(m, n, 5)
    swap_in(model, "0", layer)
    x = draw(4, n, seed=5)
    expected = model(x)
    restore_dense(model, "0")
    assert type(model[0]) is nn.Linear
    assert torch.allclose(model(x), expected, atol=1e-11)


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12)])
def test_compiles_without_graph_breaks(m, n):
    layer = built(m, n, 5)
    x = draw(2, 4, n, seed=5)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x), layer(x))


def test_parts_of_the_larger_side_are_refused():
    parts = pack(*factors(12, 30, 5), side="in")
    with pytest.raises(ValueError, match="'out'"):
        PackedLinear.from_packed(parts, None, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(("m", "n"), [(13, 21), (21, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (9,), (2, 5), (0, 4)])
def test_every_dtype_and_number_of_tokens_gathers_alike(m, n, dtype, shape):
    # Such small integers are never rounded in any dtype, so every way to gather is exact.
    def whole(*size, seed):
        return torch.randint(-1, 2, size, generator=torch.Generator().manual_seed(seed)).float()

    layer = PackedLinear(n, m, 4, True, dtype=dtype)
    for seed, p in enumerate(layer.parameters()):
        p.data = whole(*p.shape, seed=seed).to(dtype)
    layer.order = torch.randperm(min(m, n), generator=torch.Generator().manual_seed(5)).int()
    x = whole(*shape, n, seed=9)
    expected = x @ layer.dense_weight().mT + layer.bias.float()
    if dtype is not torch.float32:
        expected = expected.to(dtype).float()
    with torch.no_grad():
        assert torch.equal(layer(x.to(dtype)).float(), expected)
    with_gradient = x.to(dtype).requires_grad_()
    y = layer(with_gradient)
    assert torch.equal(y.float(), expected)
    y.sum().backward()
    assert torch.equal(with_gradient.grad.float(), layer.dense_weight().sum(0).expand(*shape, n))
