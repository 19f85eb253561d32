"""The kernel for few tokens against ordinary products, on CPU tensors by Triton's interpreter.

Triton comes with PyTorch's CUDA builds. On a CPU it is no dependency: `pip install triton`.
"""

import importlib.util
import os

import pytest
import torch

from launches import Launches
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.serve import few_tokens

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed; it is a large optional package",
)
# Read when Triton is imported first, its own functions included.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def layer_of(kind, shape, rank, dtype, bias):
    draw = torch.Generator().manual_seed(sum(shape))
    sizes = ((shape[0], rank), (rank, shape[1]), shape[:1])
    up, down, b = (torch.randn(size, generator=draw) for size in sizes)
    return kind.from_factors(up, down, b if bias else None, dtype=dtype, device="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kind", "shape", "rank"),
    [
        (LowRankLinear, (21, 30), 7),
        (PackedLinear, (21, 30), 7),
        (PackedLinear, (30, 21), 7),
        (PackedLinear, (11, 600), 10),
    ],
)
def test_few_tokens_give_what_ordinary_products_give(kind, shape, rank, bias, dtype):
    layer = layer_of(kind, shape, rank, dtype, bias)
    x = torch.randn(2, 2, shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    many = torch.randn(1, few_tokens.FEW + 1, shape[1]).to(dtype)
    with torch.no_grad():
        exact, ordinary = layer.double()(x.double()), layer.to(dtype)(many)
        assert few_tokens.quick(layer)
        with Launches() as seen:
            found = layer(x)
        assert [name for name in seen.names if "rows" in name] == ["spectrim::rows"] * 2
        assert torch.equal(layer(many), ordinary)
        one = layer(x[0, 0])
    bound = 8 * torch.finfo(dtype).eps * exact.norm()
    assert found.dtype == dtype
    assert (found.double() - exact).norm() <= bound
    assert torch.equal(one, found[0, 0])


def test_gradients_go_the_ordinary_way():
    layer = layer_of(LowRankLinear, (6, 8), 3, torch.float32, True)
    few_tokens.quick(layer)
    layer(torch.randn(1, 8)).sum().backward()
    assert layer.down.weight.grad is not None


def test_one_graph_without_a_break():
    layer = layer_of(PackedLinear, (9, 14), 4, torch.float32, False)
    x = torch.randn(1, 14)
    few_tokens.quick(layer)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(layer, fullgraph=True, backend="eager")(x)
        assert torch.equal(found, layer(x))
