"""The kernel for few tokens against ordinary products, on CPU tensors by Triton's interpreter.

Triton comes with PyTorch's CUDA builds. On a CPU it is no dependency: `pip install triton`.
"""

import importlib.util
import os

import pytest
import torch

from spectrim.layers.dense import QuantizedDense
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import QuantizedLinear, quantize_layer
from spectrim.serve import few_tokens
from spectrim.serve.fusion import fuse
from spectrim.serve.product import product_of, steps

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; it is a large optional package",
)
# Read when Triton is imported first, its own functions included.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def launches(monkeypatch):
    from spectrim.serve import triton_products

    found, launch = [], triton_products.launch

    def counted(xs, products):
        found.append(len(products))
        return launch(xs, products)

    monkeypatch.setattr(triton_products, "launch", counted)
    return found


def layer_of(kind, shape, rank, dtype, bias, seed=0):
    draw = torch.Generator().manual_seed(sum(shape) + seed)
    sizes = ((shape[0], rank), (rank, shape[1]), shape[:1])
    up, down, b = (torch.randn(size, generator=draw) for size in sizes)
    return kind.from_factors(up, down, b if bias else None, dtype=dtype, device="cpu")


def integers(shape, weights, dtype=torch.float32, bias=None):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    return QuantizedLinear.from_weight(W, bias, weights, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "rank"),
    [
        (LowRankLinear, (21, 30), 7),
        (PackedLinear, (21, 30), 7),
        (PackedLinear, (30, 21), 7),
        (PackedLinear, (11, 1100), 10),
    ],
)
def test_few_tokens_give_what_ordinary_products_give(kind, shape, rank, bias, dtype, launches):
    layer = layer_of(kind, shape, rank, dtype, bias)
    x = torch.randn(2, 2, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    many = torch.randn(1, few_tokens.FEW + 1, shape[1]).to(dtype)
    with torch.no_grad():
        exact, ordinary = layer.double()(x.double()), layer.to(dtype)(many)
        company = few_tokens.Together([layer])
        found = layer(x)
        assert launches == [1, 1]
        assert torch.equal(layer(many), ordinary)
        one = layer(x[0, 0])
        company.undo()
    bound = 8 * torch.finfo(dtype).eps * exact.norm()
    assert found.dtype == dtype
    assert (found.double() - exact).norm() <= bound
    assert torch.equal(one, found[0, 0])
    assert type(layer) is kind


@pytest.mark.parametrize("weights", ["int8", "int4", "int4-g32", "int4-g128", "int8-g64"])
@pytest.mark.parametrize("columns", [96, 1100])
def test_codes_are_their_restored_matrix(weights, columns, launches):
    from spectrim.serve.triton_restoring import restored

    bias = torch.arange(9.0)
    layer = QuantizedDense(integers((9, columns), weights, bias=bias))
    x = torch.randn(3, columns, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = x.double() @ layer.dense_weight().double().mT + bias
        few_tokens.Together([layer])
        found = layer(x)
    assert launches == [1]
    assert (found - exact).norm() <= 1e-5 * exact.norm()
    (product,) = steps(layer)
    assert torch.allclose(restored(product, torch.float32), layer.dense_weight(), atol=1e-6)


@pytest.mark.parametrize("weights", ["int2-g32", "int3-g64"])
def test_other_codes_are_restored_in_one_launch_for_any_tokens(weights):
    part = integers((7, 100), weights)
    assert not product_of(part).fits(torch.float32)
    x = torch.randn(5, 100)
    with torch.no_grad():
        expected = part(x)
        few_tokens.quick_codes(torch.nn.ModuleList([part]))
        assert torch.allclose(part(x), expected, rtol=1e-5, atol=1e-5)


def test_readers_of_one_input_share_two_launches(launches):
    model = torch.nn.ModuleDict(
        {
            "q": layer_of(PackedLinear, (24, 32), 9, torch.float32, True),
            "k": quantize_layer(
                layer_of(LowRankLinear, (16, 32), 32, torch.float32, False, 1),
                "int8",
                dtype=torch.float32,
            ),
            "v": QuantizedDense(integers((16, 32), "int4")),
            "o": layer_of(LowRankLinear, (8, 32), 5, torch.float32, False, 2),
        }
    )
    layers = dict(model.items())
    x = torch.randn(1, 32)
    with torch.no_grad():
        expected = {name: layer(x) for name, layer in layers.items()}
        fuse(model, [("q", "o")])
        for names in few_tokens.companies(layers, [("q", "k", "v")]):
            few_tokens.Together([layers[name] for name in names])
        found = {name: layer(x) for name, layer in layers.items()}
        again = {name: layers[name](x) for name in ("v", "q", "k")}
    assert launches == [3, 2, 1, 1, 3, 2]
    for name, y in expected.items():
        assert torch.allclose(found[name], y, rtol=1e-4, atol=1e-4)
        assert name == "o" or torch.equal(again[name], found[name])


def test_gradients_go_the_ordinary_way():
    layer = layer_of(LowRankLinear, (6, 8), 3, torch.float32, True)
    few_tokens.Together([layer])
    layer(torch.randn(1, 8)).sum().backward()
    assert layer.down.weight.grad is not None


def test_one_graph_without_a_break():
    layers = [layer_of(PackedLinear, (9, 14), 4, torch.float32, False, i) for i in range(2)]
    layers.append(QuantizedDense(integers((5, 14), "int4-g32")))
    few_tokens.Together(layers)
    model = torch.nn.ModuleList(layers)

    def forward(x):
        return torch.cat([layer(x) for layer in model], -1)

    x = torch.randn(1, 14)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(forward, fullgraph=True, backend="eager")(x)
        assert torch.equal(found, forward(x))
