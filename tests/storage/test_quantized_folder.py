"""Folders with coded weights: what comes back, what is counted, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import spectrim.storage.quantizer  # noqa: F401  (teaches transformers to load the folders)
from architectures import tiny, windows
from spectrim.errors import ArtifactError
from spectrim.layers.dense import QuantizedDense
from spectrim.layers.quantized import QuantizedLinear, quantize_layer
from spectrim.layers.swap import compressed_layers, swap_in
from spectrim.model.weights import read_bias, read_weight
from spectrim.storage.attach import attach
from spectrim.storage.dense import export_dense
from spectrim.storage.inspect import inspect_folder
from spectrim.storage.table import parse_table
from storage_cases import compressed, save

DENSE = {"llama": "model.layers.0.self_attn.q_proj", "gpt2": "transformer.h.0.attn.c_attn"}


def quantized(weights, name="llama", dtype=torch.float32):
    """Factored and packed layers with integers, and one whole target."""
    model = compressed(name)
    config = model.hf_quantizer.quantization_config.table
    for p in model.parameters():
        p.data = p.data.to(dtype)
    for layer in compressed_layers(model).values():
        quantize_layer(layer, weights, dtype=dtype)
    target = DENSE[name]
    old = model.get_submodule(target)
    whole = QuantizedLinear.from_weight(read_weight(old), read_bias(old), weights, dtype=dtype)
    swap_in(model, target, QuantizedDense(whole))
    prefix = f"{model.base_model_prefix}."
    left = [prefix + n for n in config.left_dense if prefix + n != target]
    model.config.dtype = dtype
    attach(model, left_dense=left)
    return model


def same(a, b):
    """Bytes, since torch compares no float8."""
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def logits(model):
    with torch.no_grad():
        return model(windows(2)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_save_and_load_are_exact(name, weights, dtype, tmp_path):
    model = quantized(weights, name, dtype)
    save(model, tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto")
    assert torch.equal(logits(model), logits(loaded))
    a, b = model.state_dict(), loaded.state_dict()
    assert a.keys() == b.keys()
    assert all(same(a[k], b[k]) for k in a)
    save(loaded, tmp_path / "two")
    first, second = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(same(first[k], second[k]) for k in first)
    configs = [(tmp_path / n / "config.json").read_text() for n in ("one", "two")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_inspection_counts_integers_against_the_native_dtype(weights, tmp_path):
    model = quantized(weights, dtype=torch.bfloat16)
    found = save(model, tmp_path / "out")
    layers = compressed_layers(model)
    for target in found.targets:
        if target.name not in layers:
            continue
        state = layers[target.name].state_dict()
        assert target.bytes == sum(t.numel() * t.element_size() for t in state.values())
        assert target.weights == weights
        assert target.dense_bytes == 2 * target.out_features * target.in_features
    kinds = {(t.storage, t.rank is None) for t in found.targets if t.weights == weights}
    assert kinds == {("dense", True), ("factored", False), ("packed", False)}


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
def test_a_loader_without_spectrim_stops(weights, tmp_path):
    quantized(weights).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"):
        shape = tuple(tiny("llama")[0].get_submodule(name).weight.shape)
        assert tensors[f"{name}.weight"].shape not in (shape, shape[::-1])


def test_dense_export_restores_the_matrices(tmp_path):
    model = quantized("int8")
    save(model, tmp_path / "small")
    export_dense(tmp_path / "small", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not compressed_layers(dense)
    assert torch.allclose(logits(dense), logits(model), atol=1e-4)
    assert inspect_folder(tmp_path / "dense").table is None


def rewritten(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["layers"])
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("field", ["shape", "rank", "weights"])
def test_a_contradicting_configuration_is_refused(field, tmp_path):
    save(quantized("int8"), tmp_path / "out")
    values = {"shape": [8, 8], "rank": 3, "weights": "int4"}

    def change(layers):
        name = next(n for n, e in layers.items() if e["storage"] == "factored")
        layers[name][field] = values[field]

    rewritten(tmp_path / "out", change)
    with pytest.raises(ArtifactError):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(ArtifactError):
        inspect_folder(tmp_path / "out")


def test_missing_scales_are_refused(tmp_path):
    save(quantized("int8"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    lost = next(k for k in tensors if k.endswith("down.scale"))
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ({"rank": 4, "storage": "factored", "weights": "int5"}, "native, int8, int4"),
        ({"rank": 4, "storage": "factored", "weights": "int8"}, "no shape"),
        ({"rank": None, "storage": "factored", "weights": "native"}, "rank None"),
        ({"rank": 4, "storage": "dense", "weights": "int8", "shape": [8, 8]}, "rank 4"),
        ({"rank": None, "storage": "dense", "weights": "native"}, "unknown storage"),
    ],
)
def test_entries_that_make_no_sense_are_refused(layer, words):
    with pytest.raises(ArtifactError, match=words):
        parse_table({"quant_method": "spectrim", "layers": {"a": layer}}, source="test")
