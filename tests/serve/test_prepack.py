import copy

import pytest
import torch
from torch import nn

from architectures import BLOCKS, tiny, windows
from spectrim.errors import ModelError
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import QuantizedLinear, wide_weight
from spectrim.layers.swap import swap_in
from spectrim.serve.bench import work_of
from spectrim.serve.fusion import fuse
from spectrim.serve.prepack import PrepackedLinear, can_prepack, prepack
from spectrim.serve.prepack_codes import PrepackedCodes

DTYPES = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            not can_prepack(torch.empty(1, dtype=dtype)), reason=f"no oneDNN kernels for {dtype}"
        ),
    )
    for dtype in (torch.float32, torch.bfloat16)
]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compressed(dtype):
    """A tiny Llama with one factored and one packed layer, the others dense."""
    model, _ = tiny("llama")
    q, k = (f"model.layers.0.self_attn.{name}_proj" for name in "qk")
    swap_in(
        model,
        q,
        LowRankLinear.from_factors(
            draw(40, 7), draw(7, 40, seed=1), None, dtype=torch.float32, device="cpu"
        ),
    )
    swap_in(
        model,
        k,
        PackedLinear.from_factors(
            draw(20, 7, seed=2), draw(7, 40, seed=3), None, dtype=torch.float32, device="cpu"
        ),
    )
    return model.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_names_bytes_and_numbers_stay(dtype):
    model, tokens = compressed(dtype), windows(2, 6)
    with torch.no_grad():
        expected = model(tokens).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    work = work_of(model)
    # Blocks of 7 layers, two of them cut in two; the head is not tied.
    assert prepack(model) == BLOCKS * 7 + 2 + 1
    assert prepack(model) == 0
    assert work_of(model) == work
    with torch.no_grad():
        found = model(tokens).logits
    assert torch.allclose(found, expected, rtol=1e-2 if dtype is torch.bfloat16 else 1e-4, atol=0.1)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(tokens).logits, found)


def test_bias_and_every_shape_of_input():
    linear = nn.Linear(13, 9)
    inside = nn.Sequential(copy.deepcopy(linear))
    prepack(inside)
    for shape in ((), (1,), (5,), (2, 3), (0,)):
        x = draw(*shape, 13)
        assert torch.allclose(inside(x), linear(x), rtol=1e-5, atol=1e-5)


def test_shared_weights_are_left_to_all_their_owners():
    model, _ = tiny("qwen3")  # its head is tied to its embedding
    prepack(model)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    layers = nn.ModuleList(LowRankLinear(12, 8, 3, False) for _ in range(2))
    fuse(layers, [("0", "1")])
    assert prepack(layers) == 2  # the up factors


def test_casts_and_loads_pack_again():
    model = nn.Sequential(nn.Linear(6, 5, bias=False))
    prepack(model)
    new = draw(5, 6)
    model.load_state_dict({"0.weight": new})
    x = draw(3, 6, seed=1)
    assert torch.allclose(model(x), x @ new.mT, atol=1e-5)
    for state, words in (({}, "Missing"), ({"0.weight": draw(5, 7)}, "shape")):
        with pytest.raises(RuntimeError, match=words):
            model.load_state_dict(state)
    with pytest.raises(ModelError, match="float64"):
        model.double()
    if can_prepack(torch.empty(1, dtype=torch.bfloat16)):
        model.to(torch.bfloat16)
        assert isinstance(model[0], PrepackedLinear)
        assert torch.equal(model[0].weight, new.to(torch.bfloat16))
        assert model(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_what_oneDNN_does_not_multiply_is_left():
    model = nn.Sequential(nn.Linear(6, 5)).double()
    assert prepack(model) == 0
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("n", [32, 45])
def test_int4_codes_go_through_their_kernel_and_come_back(n):
    W, bias = draw(48, n), draw(48, seed=1)
    linear = QuantizedLinear.from_weight(W, bias, "int4", dtype=torch.bfloat16)
    model = nn.Sequential(copy.deepcopy(linear))
    assert prepack(model) == 1
    assert isinstance(model[0], PrepackedCodes)
    assert torch.equal(wide_weight(model[0]), linear.wide_weight())
    state = linear.state_dict()
    assert model[0].state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model[0].state_dict().items())
    for shape in ((1,), (3,), (2, 5), (0,)):
        x = draw(*shape, n, seed=2).to(torch.bfloat16)
        exact = x.double() @ linear.wide_weight().double().mT + linear.bias.double()
        found = copy.deepcopy(model)(x)
        assert found.dtype == torch.bfloat16
        assert (found.double() - exact).norm() <= 8e-3 * exact.norm()
    stored = sum(t.numel() * t.element_size() for t in linear.buffers())
    assert model[0].weight_bytes == stored
    with pytest.raises(ModelError, match="float32"):
        model.float()
    with pytest.raises(RuntimeError, match="prepack"):
        model[0].load_state_dict(state)


def test_int4_weights_that_the_kernel_does_not_suit_stay():
    for m, dtype in ((40, torch.bfloat16), (48, torch.float32)):
        linear = QuantizedLinear.from_weight(draw(m, 32), None, "int4", dtype=dtype)
        model = nn.Sequential(linear)
        assert prepack(model) == 0
        assert model[0] is linear
