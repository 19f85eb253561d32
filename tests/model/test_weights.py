"""Weights are (out, in) whatever the module stores, and unfit models are refused by name."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from architectures import ARCHITECTURES, tiny
from spectrim.errors import ModelError, NonFiniteError
from spectrim.model.weights import (
    check_model,
    get_module,
    is_linear,
    read_bias,
    read_weight,
    replace_module,
    write_weight,
)


@pytest.mark.parametrize("module", [nn.Linear(5, 3), Conv1D(3, 5)], ids=["linear", "conv1d"])
def test_the_weight_acts_as_the_module_does(module):
    nn.init.normal_(module.bias)
    x = torch.randn(4, 5)
    W = torch.randn(3, 5)
    write_weight(module, W)
    assert torch.equal(read_weight(module), W)
    torch.testing.assert_close(module(x), x @ W.T + read_bias(module))
    assert is_linear(module)
    assert not read_weight(module).requires_grad
    with pytest.raises(ModelError, match=r"\(5, 3\), expected \(3, 5\)"):
        write_weight(module, W.T)


def test_no_bias_is_none_and_other_modules_have_no_weight():
    assert read_bias(nn.Linear(2, 2, bias=False)) is None
    assert not is_linear(nn.LayerNorm(3))
    with pytest.raises(ModelError, match="LayerNorm"):
        read_weight(nn.LayerNorm(3))


def test_replacing_returns_the_module_before():
    model, _ = tiny("llama")
    name = "model.layers.1.mlp.up_proj"
    before, new = get_module(model, name), nn.Identity()
    assert replace_module(model, name, new) is before
    assert get_module(model, name) is new
    block = get_module(model, "model.layers.1")
    replace_module(model, "model.layers.1", new)
    assert model.model.layers[1] is new
    replace_module(model, "model.layers.1", block)
    with pytest.raises(ModelError, match=r"layers\.7"):
        get_module(model, "model.layers.7")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sound_models_pass(name):
    check_model(tiny(name)[0])


def test_bad_values_name_the_weight():
    model, _ = tiny("opt")
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[0, :2] = torch.tensor([float("nan"), torch.inf])
    with pytest.raises(NonFiniteError, match=r"layers\.1\.fc1\.weight' holds 2 NaN"):
        check_model(model)


class Compressed(nn.Module):
    is_compressed_layer = True


def test_unfit_models_are_refused():
    model, _ = tiny("llama")
    replace_module(model, "model.layers.0.mlp.up_proj", Compressed())
    with pytest.raises(ModelError, match=r"already compressed: 'model\.layers\.0\.mlp\.up_proj'"):
        check_model(model)
    model, _ = tiny("llama")
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(ModelError, match="gptq"):
        check_model(model)
    model, _ = tiny("llama")
    model.hf_quantizer = object()
    with pytest.raises(ModelError, match="hf_quantizer"):
        check_model(model)
    model, _ = tiny("llama")
    model.config.is_encoder_decoder = True
    with pytest.raises(ModelError, match="encoder-decoder"):
        check_model(model)
    with pytest.raises(ModelError, match="no list of blocks"):
        check_model(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(ModelError, match="never loaded"):
        check_model(tiny("llama")[0].to("meta"))
