"""The export holds the codes as they are: by the definition of its format, and by its package."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from architectures import windows
from jobs import logits
from spectrim import api
from spectrim.errors import InputError
from spectrim.layers.dense import QuantizedDense
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.quantized import QuantizedLinear
from spectrim.layers.swap import compressed_layers, swap_in
from spectrim.storage.attach import attach
from spectrim.storage.compressed_tensors import packed_int32
from spectrim.storage.inspect import inspect_folder

SETS = {
    "pack-quantized": ("int8", "int4-g32", "int4-g64", "int8-g32"),
    "float-quantized": ("fp8",) * 4,
    "mixed-precision": ("fp8", "int4-g32", "fp8", "int8"),
}
"""What the package calls a file of some formats -> formats of q, k, v, o."""


@pytest.fixture(scope="module", params=SETS)
def rounded(request):
    """A Llama of widths that groups divide, four layers in up to four formats."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes, **heads)).eval()
    for name, weights in zip("qkvo", SETS[request.param], strict=True):
        path = f"model.layers.0.self_attn.{name}_proj"
        W = model.get_submodule(path).weight
        inner = QuantizedLinear.from_weight(W, None, weights, dtype=torch.float32)
        swap_in(model, path, QuantizedDense(inner))
    return model


def saved(model, folder):
    attach(model)
    model.save_pretrained(folder)
    return folder


def unpacked(words, bits, columns):
    """The format's definition, one code at a time."""
    mask, offset = 2**bits - 1, 2 ** (bits - 1)
    per_word = 32 // bits
    rows = [
        [
            ((int(row[j // per_word]) >> (bits * (j % per_word))) & mask) - offset
            for j in range(columns)
        ]
        for row in words
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_words_hold_the_codes(bits):
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 23), generator=generator)
    assert torch.equal(unpacked(packed_int32(codes, bits), bits, 23), codes)


def test_codes_times_scales_are_the_stored_matrices(rounded, tmp_path):
    source = saved(rounded, tmp_path / "source")
    api.export(source, output=tmp_path / "out", to="compressed-tensors")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    stored = {target.name: target for target in inspect_folder(source).targets}
    for name, layer in compressed_layers(rounded).items():
        assert stored[name].weights == layer.weights
        if layer.weights == "fp8":
            codes = tensors[f"{name}.weight"]
            assert codes.dtype == torch.float8_e4m3fn
            assert f"{name}.weight_packed" not in tensors
        else:
            bits = layer.inner.format.bits
            codes = unpacked(tensors[f"{name}.weight_packed"], bits, layer.in_features)
            shape = [layer.out_features, layer.in_features]
            assert tensors[f"{name}.weight_shape"].tolist() == shape
        codes = codes.double()
        scale = tensors[f"{name}.weight_scale"].double()
        W = codes * scale.repeat_interleave(layer.in_features // scale.shape[1], dim=1)
        assert torch.allclose(W, layer.dense_weight().double(), rtol=1e-6)


def test_the_configuration_says_how_codes_lie(rounded, tmp_path):
    source = saved(rounded, tmp_path / "source")
    api.export(source, output=tmp_path / "out", to="compressed-tensors")
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    formats = {layer.weights for layer in compressed_layers(rounded).values()}
    assert SETS[scheme["format"]] == tuple(x.weights for x in compressed_layers(rounded).values())
    assert len(scheme["config_groups"]) == len(formats)
    for group in scheme["config_groups"].values():
        (weights,) = {rounded.get_submodule(name).weights for name in group["targets"]}
        assert group["weights"]["type"] == ("float" if weights == "fp8" else "int")
        own = "float-quantized" if weights == "fp8" else "pack-quantized"
        assert group.get("format", scheme["format"]) == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_package_reads_the_same_logits(rounded, dtype, tmp_path):
    pytest.importorskip("compressed_tensors")
    model = copy.deepcopy(rounded).to(dtype)
    model.config.dtype = dtype
    source = saved(model, tmp_path / "source")
    api.export(source, output=tmp_path / "out", to="compressed-tensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    ids = windows(2) % 64
    atol = 1e-4 if dtype == torch.float32 else 5e-3
    assert torch.allclose(logits(loaded, ids), logits(model, ids), atol=atol)


def test_what_it_cannot_hold_is_named(rounded, tmp_path):
    path = "model.layers.0.mlp.down_proj"
    model = LlamaForCausalLM(rounded.config).eval()
    W = model.get_submodule(path).weight
    cut = LowRankLinear.from_factors(W[:, :4], W[:4], None, dtype=torch.float32, device="cpu")
    for layer, words in (
        (cut, "whole matrices only"),
        (QuantizedDense(QuantizedLinear.from_weight(W, None, "int4", dtype=W.dtype)), "int4-g32"),
    ):
        swap_in(model, path, layer)
        folder = saved(model, tmp_path / words.split()[0])
        with pytest.raises(InputError, match=f"down_proj.*{words}"):
            api.export(folder, output=tmp_path / "out", to="compressed-tensors")
    with pytest.raises(InputError, match="unknown format"):
        api.export(folder, output=tmp_path / "out", to="awq")
