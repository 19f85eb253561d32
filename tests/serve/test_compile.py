"""Compressed models go through torch's compiler in one graph, with the static cache."""

import shutil

import pytest
import torch
from transformers import StaticCache
from transformers.generation import CompileConfig

from architectures import tiny, windows
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import quantize_layer
from spectrim.layers.swap import dense_shape, is_dense_linear, swap_in
from spectrim.serve.fusion import fuse
from spectrim.storage.attach import attach


def compressed():
    """Factored attention, packed MLP, one integer layer; what a graph may meet."""
    model, _ = tiny("llama")
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if is_dense_linear(module) and "head" not in name:
            m, n = dense_shape(module, name)
            kind = PackedLinear if "mlp" in name else LowRankLinear
            generator = torch.Generator().manual_seed(seed)
            up, down = (torch.randn(s, generator=generator) / 5 for s in ((m, 7), (7, n)))
            layer = kind.from_factors(up, down, None, dtype=torch.float32, device="cpu")
            if name.endswith("0.self_attn.o_proj"):
                layer = quantize_layer(layer, "int8", dtype=torch.float32)
            swap_in(model, name, layer)
    attach(model)
    return model


def test_generation_with_a_static_cache_compiles_without_a_break():
    model = compressed()
    fuse(model)
    assert model.hf_quantizer.is_compileable
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = windows(1, 5)
    expected = model.generate(tokens, **options)
    # `eager` runs the captured graph as it is; `fullgraph` makes every break an error.
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True  # transformers compiles by itself on accelerators only
    torch.compiler.reset()
    found = model.generate(tokens, cache_implementation="static", compile_config=config, **options)
    assert torch.equal(found, expected)


@pytest.mark.slow  # half a minute of C++ compilation
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_compiled_code_computes_the_same():
    model = compressed()
    block, x = model.model.layers[0].mlp, torch.randn(1, 3, 40)
    torch.compiler.reset()
    with torch.no_grad():
        found = torch.compile(block, fullgraph=True)(x)
        assert torch.allclose(found, block(x), rtol=1e-4, atol=1e-4)


def test_a_static_cache_holds_what_the_growing_one_holds():
    model, tokens = compressed(), windows(2, 6)
    with torch.no_grad():
        expected = model(tokens).logits
        cache = StaticCache(config=model.config, max_cache_len=9)
        parts = [model(tokens[:, a:b], past_key_values=cache).logits for a, b in ((0, 4), (4, 6))]
    assert torch.allclose(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
