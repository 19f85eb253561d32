import copy

import pytest
import torch

from spectrim.allocate.budget import Shape, layer_bytes
from spectrim.formats.int8 import KERNEL_MULTIPLE
from spectrim.layers.dense import QuantizedDense
from spectrim.layers.layout import layout_of
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import (
    QuantizedLinear,
    quantize_layer,
    rounded,
    skeleton,
)

FORMATS = ("int8", "int4", "fp8")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(m, n, weights, *, bias=True, dtype=torch.float32):
    b = draw(m, seed=2) if bias else None
    return QuantizedLinear.from_weight(draw(m, n, seed=1), b, weights, dtype=dtype)


def compressed(kind, m, n, k, weights, *, dtype=torch.float32, bias=True):
    if kind == "dense":
        return QuantizedDense(dense(m, n, weights, bias=bias, dtype=dtype))
    layer = {"factored": LowRankLinear, "packed": PackedLinear}[kind].from_factors(
        draw(m, k, seed=3),
        draw(k, n, seed=4),
        draw(m, seed=5) if bias else None,
        dtype=torch.float64,
        device="cpu",
    )
    return quantize_layer(layer, weights, dtype=dtype)


@pytest.mark.parametrize("weights", FORMATS)
def test_constant_and_zero_rows_are_exact(weights):
    W = torch.tensor([[0.0] * 40, [0.25] * 40, [-3.0] * 40], dtype=torch.float64)
    # A scale in bf16 has eight bits.
    rtol = 2**-8 if weights == "fp8" else 1e-6
    assert torch.allclose(rounded(W, weights, torch.float32), W, rtol=rtol)


@pytest.mark.parametrize("weights", FORMATS)
def test_rounding_twice_is_rounding_once(weights):
    once = rounded(draw(12, 50), weights, torch.float32)
    assert torch.allclose(rounded(once, weights, torch.float32), once, rtol=1e-2, atol=2e-2)
    if weights != "int4":
        assert torch.allclose(rounded(once, weights, torch.float32), once, rtol=1e-6)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", ["dense", "factored", "packed"])
@pytest.mark.parametrize(("m", "n", "k"), [(24, 40, 7), (40, 24, 9), (33, 33, 33)])
def test_bytes_shapes_and_skeleton_agree_with_the_budget(kind, m, n, k, weights):
    rank = None if kind == "dense" else k
    for bias in (True, False):
        layer = compressed(kind, m, n, k, weights, dtype=torch.bfloat16, bias=bias)
        state = layer.state_dict()
        stored = sum(t.numel() * t.element_size() for t in state.values())
        assert stored == layer_bytes(
            Shape(m, n, bias), rank=rank, storage=kind, weights=weights, dtype_bytes=2
        )
        layout = layout_of(kind, weights)
        shapes = {key: tuple(t.shape) for key, t in state.items()}
        assert shapes == layout.tensors(m, n, rank or 0, bias)
        assert shapes[layout.weight_key] not in {(m, n), (n, m)}
        empty = skeleton(kind, weights, (m, n), rank, bias=bias, dtype=torch.bfloat16)
        assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
        for key, tensor in empty.state_dict().items():
            assert (tensor.shape, tensor.dtype) == (state[key].shape, state[key].dtype)


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("kind", ["dense", "factored", "packed"])
@pytest.mark.parametrize(("m", "n"), [(32, 48), (48, 32), (37, 21)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_is_the_product_with_the_restored_matrix(kind, m, n, weights, dtype):
    layer = compressed(kind, m, n, 16, weights, dtype=dtype)
    x = draw(2, 5, n, seed=9).to(dtype)
    y = layer(x)
    assert y.shape == (2, 5, m)
    assert y.dtype == dtype
    exact = x.double() @ layer.dense_weight().double().mT + layer.bias.double()
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    assert (y.double() - exact).norm() <= tolerance * exact.norm()


def test_the_fast_kernel_computes_what_the_portable_path_computes():
    layer = dense(2 * KERNEL_MULTIPLE, 3 * KERNEL_MULTIPLE, "int8", dtype=torch.bfloat16)
    x = draw(7, 3 * KERNEL_MULTIPLE, seed=9).bfloat16()
    fast = layer(x)
    portable = layer(x.clone().requires_grad_())
    assert (fast.double() - portable.double()).norm() <= 1e-2 * portable.double().norm()


@pytest.mark.parametrize("weights", FORMATS)
def test_products_in_fp16_are_finite_wherever_their_values_are(weights):
    W = draw(32, 512, seed=1) / 50
    x = 300 * draw(3, 512, seed=2)
    layer = QuantizedLinear.from_weight(W, None, weights, dtype=torch.float16)
    exact = x @ layer.wide_weight().double().mT
    assert 200 < exact.abs().max() < 1000
    assert torch.allclose(layer(x.half()).double(), exact, rtol=1e-2, atol=1)


@pytest.mark.parametrize("weights", FORMATS)
def test_casting_the_model_leaves_the_stored_numbers(weights):
    layer = compressed("factored", 24, 40, 8, weights)
    before = copy.deepcopy(layer.state_dict())
    layer.to(torch.bfloat16).to(torch.float32).to(torch.float16)
    for key, tensor in layer.state_dict().items():
        if not key.endswith("bias"):
            assert tensor.dtype == before[key].dtype
            assert torch.equal(tensor.view(torch.uint8), before[key].view(torch.uint8))
    assert layer.weight.dtype == torch.float16
    assert layer.up.bias.dtype == torch.float16


@pytest.mark.parametrize("weights", FORMATS)
def test_gradients_reach_the_input(weights):
    layer = compressed("dense", 32, 32, 1, weights)
    x = draw(3, 32).float().requires_grad_()
    layer(x).sum().backward()
    expected = layer.dense_weight().sum(dim=0).expand(3, 32)
    assert torch.allclose(x.grad, expected, rtol=1e-4, atol=1e-4)
