"""Codes that stay while the grid they stand on is trained."""

import pytest
import torch

from architectures import tiny, windows
from jobs import logits
from spectrim import api
from spectrim.layers.quantized import QuantizedLinear, trained_scales
from spectrim.layers.swap import compressed_layers
from spectrim.recipes import get_recipe

FORMATS = ("int8", "fp8", "int4", "int4-g32", "int3-g64", "int2-g128")


def layer_of(weights):
    W = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    return QuantizedLinear.from_weight(W, None, weights, dtype=torch.float32)


@pytest.mark.parametrize("weights", FORMATS)
def test_scales_are_parameters_for_the_time_of_the_context(weights):
    layer, x = layer_of(weights), torch.randn(3, 128)
    before = {name: tensor.clone() for name, tensor in layer.stored.items()}
    expected = layer(x)
    with trained_scales([layer]):
        names = {name for name, _ in layer.named_parameters()}
        assert names == set(before) - {"codes"}
        assert torch.equal(layer(x), expected)
    assert not list(layer.parameters())
    assert all(
        torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in layer.stored.items()
    )


@pytest.mark.parametrize("weights", FORMATS)
def test_gradients_are_those_of_the_decoded_matrix(weights):
    """`∂L/∂s_ig = Σ_j∈g ∂L/∂W_ij q_ij`, from the matrix of codes at scale one."""
    layer, x = layer_of(weights), torch.randn(5, 128)
    dW = layer(x).mT @ x  # of ½‖y‖²
    codes = layer.format.unpack(layer.codes, 128).float()
    with trained_scales([layer]):
        scale = layer.scale.requires_grad_()
        (0.5 * layer(x).square().sum()).backward()
        found = scale.grad.float().reshape(6, -1)
    expected = (dW * codes).view(6, found.shape[1], -1).sum(2)
    assert torch.allclose(found, expected, rtol=2e-2, atol=1e-2 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("storage", "weights", "parts"),
    [("dense", "int4-g32", ["inner"]), ("residual", "int3-g32+int8", ["base", "up", "down"])],
)
def test_blocks_are_trained_behind_frozen_codes(tmp_path, storage, weights, parts):
    """The first block has the codes of the untrained run, other scales, and a smaller error."""
    model, _ = tiny("llama")
    options = {
        "keep": 0.35,
        "text": windows(32, length=16),
        "storage": storage,
        "weights": weights,
        "measure": False,
    }
    source = tmp_path / "source"
    model.save_pretrained(source)
    plain = api.compress(source, recipe="spectrim", **options)
    recipe = get_recipe("spectrim").with_changes(
        refine=[
            {"step": "block", "epochs": 4, "batch": 4, "learning_rate": 0.0005, "relative": True}
        ]
    )
    trained = api.compress(source, recipe=recipe, output=tmp_path / "out", **options)
    block = trained.report["blocks"]["model.layers.0"]
    assert block["after"] < block["before"]
    pairs = zip(
        compressed_layers(plain.model).items(),
        compressed_layers(trained.model).values(),
        strict=True,
    )
    first = [(a, b) for (name, a), b in pairs if name.startswith("model.layers.0.")]
    first = [(a, b) for a, b in first if a.storage == storage]
    assert first
    for a, b in ((a.get_submodule(p), b.get_submodule(p)) for a, b in first for p in parts):
        assert torch.equal(a.codes, b.codes)
        assert not torch.equal(a.scale, b.scale)
        assert b.scale.dtype == a.scale.dtype
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(logits(loaded, windows(2)), logits(trained.model, windows(2)))
