"""A prepared model computes what the loaded one did, in the memory it was given, and says how."""

import pytest
import torch

import second_device
from architectures import windows
from jobs import logits
from launches import Launches
from spectrim.errors import BudgetError, ModelError
from spectrim.layers.dense import QuantizedDense
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import QuantizedLinear, quantize_layer
from spectrim.layers.swap import compressed_layers, swap_in
from spectrim.model.weights import read_weight
from spectrim.serve.prepare import memory_of, prepare
from storage_cases import compressed

IDS = windows(2, 6)


def mixed():
    """Factored, packed and dense layers, one of each of the first two kinds in int4."""
    model = compressed("llama").eval()
    names = [n for n, layer in compressed_layers(model).items() if layer.storage == "factored"]
    quantize_layer(model.get_submodule(names[0]), "int4", dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj"
    inner = QuantizedLinear.from_weight(
        read_weight(model.get_submodule(name)), None, "int8", dtype=torch.float32
    )
    swap_in(model, name, QuantizedDense(inner))
    return model


def kinds(found):
    return [way.split(", ")[0] for way in found.layers.values()]


@pytest.fixture
def far():
    if not second_device.available():
        pytest.skip("no second device can be imitated beside a real one")
    with second_device.second_device() as device:
        yield device


def test_on_the_host_integers_are_restored_and_packed_layers_stay():
    model = mixed()
    expected, before = logits(model, IDS), memory_of(model)
    found = prepare(model, memory="any")
    assert torch.allclose(logits(model, IDS), expected, rtol=1e-4, atol=1e-4)
    assert found.bytes_before == before < found.bytes_after == memory_of(model)
    # In fp32 no kernel reads codes: both are restored, and the whole matrix is a plain layer again.
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert found.layers["model.layers.0.self_attn.q_proj"] == "dense"
    assert kinds(found).count("packed") == len(
        [m for m in model.modules() if isinstance(m, PackedLinear)]
    )
    assert sum(found.record()["layers"].values()) == len(found.layers)
    with pytest.raises(ModelError, match="prepared already"):
        prepare(model)


def test_without_more_memory_nothing_grows():
    model = mixed()
    found = prepare(model)
    assert found.bytes_after <= found.bytes_before
    assert any(isinstance(m, QuantizedLinear) for m in model.modules())
    with pytest.raises(BudgetError, match="the weights take"):
        prepare(mixed(), memory=1000)
    with pytest.raises(BudgetError, match="no size"):
        prepare(mixed(), memory="plenty")


def test_elsewhere_packed_layers_become_factors_and_readers_of_one_input_are_joined(far):
    model = compressed("llama", rank=9).to(far)
    ids = IDS.to(far)
    expected, before = logits(model, ids).cpu(), memory_of(model)
    packed = [n for n, m in compressed_layers(model).items() if isinstance(m, PackedLinear)]
    tight = prepare(compressed("llama", rank=9).to(far))
    assert kinds(tight).count("packed") == len(packed)
    assert any("joined" in way for way in tight.layers.values())
    # Factors need k² numbers more and no order: room for the least of them serves one layer.
    one = prepare(compressed("llama", rank=9).to(far), memory=before + 4 * (9**2 - 40))
    assert kinds(one).count("packed") == len(packed) - 1
    free = prepare(model, memory="any")
    assert set(kinds(free)) == {"factored"}
    assert torch.allclose(logits(model, ids).cpu(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "shape", "bound"),
    [
        (LowRankLinear, (48, 64), 2),
        (PackedLinear, (48, 64), 4),  # two products, a cat and a gather
        (PackedLinear, (64, 48), 4),  # a gather, two products and a sum
    ],
)
def test_a_layer_launches_few_kernels_and_never_waits(kind, shape, bound, far):
    up, down = torch.randn(shape[0], 16), torch.randn(16, shape[1])
    layer = kind.from_factors(up, down, None, dtype=torch.float32, device=far)
    x = torch.randn(1, 1, shape[1]).to(far)
    second_device.WAITS.clear()
    with torch.no_grad(), Launches() as seen:
        layer(x)
    assert len(seen.names) <= bound, seen.names
    assert not second_device.WAITS


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_integer_layers_never_wait(weights, far):
    layer = QuantizedLinear.from_weight(torch.randn(48, 64), None, weights, dtype=torch.float32)
    layer, x = layer.to(far), torch.randn(1, 1, 64).to(far)
    second_device.WAITS.clear()
    with torch.no_grad():
        layer(x)
    assert not second_device.WAITS
