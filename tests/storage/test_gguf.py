"""The file holds what the result holds: read back by transformers, and block by block."""

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from architectures import windows
from jobs import logits
from spectrim import api
from spectrim.demo.run import MODEL
from spectrim.errors import InputError
from spectrim.formats import FORMATS
from spectrim.layers.dense import QuantizedDense
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.quantized import QuantizedLinear
from spectrim.layers.swap import compressed_layers, swap_in
from spectrim.storage.attach import attach
from spectrim.storage.gguf_blocks import block_type, blocks

WIDTHS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8192,
}
LAYERS = {
    "self_attn.q_proj": "int4-g32",
    "self_attn.k_proj": "int8-g64",
    "self_attn.v_proj": "int3-g32",
    "self_attn.o_proj": "int8",
    "mlp.gate_proj": "int4",
    "mlp.down_proj": "int2-g128",
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def result(kind, config, folder):
    """A model with layers in several formats, saved with the bundled model's tokenizer."""
    torch.manual_seed(0)
    model = kind(config(**WIDTHS)).eval()
    for path, weights in LAYERS.items():
        name = f"model.layers.1.{path}"
        W = model.get_submodule(name).weight
        inner = QuantizedLinear.from_weight(W, None, weights, dtype=torch.float32)
        swap_in(model, name, QuantizedDense(inner))
    attach(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    "kind, config", [(LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)]
)
def test_transformers_reads_the_same_logits(kind, config, tmp_path):
    model = result(kind, config, tmp_path / "source")
    api.export(tmp_path / "source", output=tmp_path / "out", to="gguf")
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    ids = windows(2, vocab_size=8192)
    expected = logits(model, ids)
    # int8's scales are fp32 here and fp16 there.
    assert torch.allclose(logits(back, ids), expected, atol=2e-4 * float(expected.abs().max()))


def test_the_tokenizer_is_the_same(tmp_path):
    result(LlamaForCausalLM, LlamaConfig, tmp_path / "source")
    api.export(tmp_path / "source", output=tmp_path / "out", to="gguf")
    mine = AutoTokenizer.from_pretrained(MODEL)
    back = AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    text = "It's 1842, and the (old) house -- grey, silent -- was sold!\n\n\tTwice."
    assert back(text).input_ids == mine(text).input_ids


@pytest.mark.parametrize("weights", [n for n, row in FORMATS.items() if row.integer])
def test_blocks_decode_to_the_stored_matrix(weights):
    row = FORMATS[weights]
    W = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    tensors = row.encode(W, dtype=torch.float32)
    scales = {k: t if t.ndim == 2 else t[:, None] for k, t in tensors.items() if k != "codes"}
    stored = blocks(row.unpack(tensors["codes"], 256), scales, row.bits, name="w")
    kind = gguf.GGMLQuantizationType[block_type(row.bits, "zero" in scales)]
    found = torch.from_numpy(dequantize(stored.numpy(), kind))
    exact = weights not in ("int8", "int4")  # whose scales, or lowest values, are rounded to fp16
    assert torch.allclose(
        found, row.decode(tensors, 256), rtol=0 if exact else 1e-3, atol=1e-3 * (not exact)
    )


def test_rotations_of_llama3_are_divided_by_their_factors(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**WIDTHS, rope_parameters=LLAMA3)).eval()
    layer = QuantizedLinear.from_weight(
        model.model.layers[0].mlp.up_proj.weight, None, "int4-g32", dtype=torch.float32
    )
    swap_in(model, "model.layers.0.mlp.up_proj", QuantizedDense(layer))
    attach(model)
    model.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(tmp_path / "source")
    api.export(tmp_path / "source", output=tmp_path / "out", to="gguf")
    tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    plain = 1e4 ** -(np.arange(0, 16, 2) / 16)
    rotations = model.model.rotary_emb.inv_freq.numpy()
    assert np.allclose(plain / tensors["rope_freqs.weight"].data, rotations, rtol=1e-6)


def test_what_cannot_be_held_is_named(tmp_path):
    model = result(LlamaForCausalLM, LlamaConfig, tmp_path / "source")
    W = model.model.layers[0].mlp.up_proj.weight
    layer = LowRankLinear.from_factors(
        W[:, :4].double(), W[:4].double(), None, dtype=W.dtype, device="cpu"
    )
    swap_in(model, "model.layers.0.mlp.up_proj", layer)
    model.save_pretrained(tmp_path / "cut")
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj is stored factored.*--dense"):
        api.export(tmp_path / "cut", output=tmp_path / "out", to="gguf")
    assert set(compressed_layers(model)) and not (tmp_path / "out").exists()


def test_float8_is_refused_with_the_nearest_type(tmp_path):
    model = result(LlamaForCausalLM, LlamaConfig, tmp_path / "source")
    W = model.model.layers[0].mlp.up_proj.weight
    layer = QuantizedDense(QuantizedLinear.from_weight(W, None, "fp8", dtype=torch.float32))
    swap_in(model, "model.layers.0.mlp.up_proj", layer)
    model.save_pretrained(tmp_path / "float8")
    with pytest.raises(InputError, match=r"layers.0.mlp.up_proj has fp8 .*int8-g32"):
        api.export(tmp_path / "float8", output=tmp_path / "out", to="gguf")


def test_another_architecture_is_refused(tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=64, num_attention_heads=2, **sizes))
    name = "gpt_neox.layers.0.mlp.dense_h_to_4h"
    old = model.get_submodule(name)
    inner = QuantizedLinear.from_weight(old.weight, old.bias, "int4-g32", dtype=torch.float32)
    swap_in(model, name, QuantizedDense(inner))
    attach(model)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(InputError, match="gpt_neox; what is written to GGUF are llama"):
        api.export(tmp_path / "source", output=tmp_path / "out", to="gguf")
