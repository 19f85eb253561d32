import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import spectrim
from architectures import BLOCKS, tiny, windows
from spectrim.errors import ModelError
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.layers.quantized import quantize_layer
from spectrim.layers.swap import dense_shape, is_dense_linear, swap_in
from spectrim.serve.fusion import fuse
from spectrim.serve.latent.cache import LatentCache
from spectrim.serve.latent.switch import latent_cache
from spectrim.storage.attach import attach

KINDS = {"factored": LowRankLinear, "packed": PackedLinear}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compressed(architecture="llama", kind="factored", *, rank=7, only="_proj"):
    """A tiny model in fp64 with low-rank layers; key and value heads are 20 numbers wide."""
    model, _ = tiny(architecture)
    model.double()
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if is_dense_linear(module) and name.endswith(only):
            m, n = dense_shape(module, name)
            up, down = draw(m, rank, seed=seed) / n**0.5, draw(rank, n, seed=seed + 99) / rank**0.5
            layer = KINDS[kind].from_factors(
                up, down, module.bias, dtype=torch.float64, device="cpu"
            )
            swap_in(model, name, layer)
    return model


def padded():
    """Two prompts of different lengths, the shorter one padded on its left."""
    tokens = windows(2, 6, seed=3)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def written(model, **options):
    with torch.no_grad():
        return model.generate(
            **padded(),
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("llama", "factored"),
        ("llama", "packed"),
        ("qwen2", "factored"),  # biases
        ("qwen3", "packed"),  # a norm per head
        ("opt", "factored"),  # no rotary embedding
    ],
)
def test_generated_logits_are_those_of_the_dense_cache(architecture, kind):
    model = compressed(architecture, kind)
    expected = written(model)
    switch = latent_cache(model)
    found = written(model)
    assert isinstance(found.past_key_values, LatentCache)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)
    # 10 tokens were cached for each of 2 sequences.
    layers = found.past_key_values.layers
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in layers)
    assert cached * 8 == 20 * switch.latent_bytes_per_token
    width = 40 if architecture == "opt" else 20
    assert switch.latent_bytes_per_token * width == switch.dense_bytes_per_token * 7
    switch.off()
    assert type(written(model).past_key_values) is DynamicCache


def test_rotations_are_kept_once_for_all_layers_and_counted():
    model = compressed()
    switch = latent_cache(model)
    cache = written(model).past_key_values
    (track,) = cache.tracks
    assert [t.shape for t in track.pair] == [(2, 10, 10)] * 2
    numbers = 2 * 2 * 10 * 10
    assert cache.nbytes == 20 * switch.latent_bytes_per_token + numbers * track.pair[0].itemsize


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_take_their_past_along(options):
    model = compressed()
    expected = written(model, **options)
    latent_cache(model)
    found = written(model, **options)
    assert torch.equal(found.sequences, expected.sequences)


def test_a_prompt_read_in_pieces_and_taken_back():
    model, tokens = compressed(), windows(2, 9)
    switch = latent_cache(model)
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        cache = switch.new_cache()
        pieces = [
            model(tokens[:, a:b], past_key_values=cache).logits for a, b in ((0, 4), (4, 7), (7, 9))
        ]
        assert torch.allclose(torch.cat(pieces, dim=1), expected, rtol=1e-9, atol=1e-9)
        cache.crop(-5)
        again = model(tokens[:, 4:], past_key_values=cache).logits
        assert torch.allclose(again, expected[:, 4:], rtol=1e-9, atol=1e-9)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(tokens[:, :3], past_key_values=cache).logits
        assert torch.allclose(again, expected[:, :3], rtol=1e-9, atol=1e-9)


def test_only_smaller_latents_are_cached_and_dense_layers_stay():
    model = compressed(only="v_proj")
    expected = written(model)
    switch = latent_cache(model)
    assert all(site.key is None and site.value is not None for site in switch.sites)
    assert switch.latent_bytes_per_token == BLOCKS * (20 + 7) * 8
    found = written(model)
    for a, b in zip(found.logits, expected.logits, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_fused_quantised_copied_and_reloaded_models(tmp_path):
    model = compressed().float()
    attach(model)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, layer in list(model.named_modules()):
        if name.endswith("v_proj"):
            quantize_layer(layer, "int8", dtype=torch.float32)
    fuse(model)
    expected = written(model)
    latent_cache(model)
    for one in (model, copy.deepcopy(model)):
        found = written(one)
        assert isinstance(found.past_key_values, LatentCache)
        for a, b in zip(found.logits, expected.logits, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)


def test_other_caches_and_no_cache_are_left_alone():
    model, tokens = compressed(), windows(1, 6)
    latent_cache(model)
    with torch.no_grad():
        expected = model(tokens, use_cache=False)
        assert expected.past_key_values is None
        static = StaticCache(config=model.config, max_cache_len=8)
        found = model(tokens, past_key_values=static)
        assert found.past_key_values is static
        own = DynamicCache(config=model.config)
        model(tokens, past_key_values=own)
        assert own.get_seq_length() == 6
    own = DynamicCache(config=model.config)
    assert written(model, past_key_values=own).past_key_values is own
    assert own.get_seq_length() == 10
    assert torch.allclose(found.logits, expected.logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("llama", {"rank": 20}, "no smaller rank"),
        ("llama", {"only": "q_proj"}, "cached whole"),
        ("phi3", {}, "together with the queries"),
        ("mistral", {}, "SlidingWindow"),
    ],
)
def test_models_without_latents_are_refused_with_the_reason(architecture, options, words):
    model = compressed(architecture, **options)
    with pytest.raises(ModelError, match=words):
        spectrim.latent_cache(model)
    assert type(written(model).past_key_values) is DynamicCache


def test_misuse_is_named():
    with pytest.raises(ModelError, match="transformers model"):
        latent_cache(torch.nn.Linear(2, 2))
    model, tokens = compressed(), windows(1, 6)
    old = latent_cache(model)
    with pytest.raises(ModelError, match="already"):
        latent_cache(model)
    old.off()
    latent_cache(model)
    with pytest.raises(ModelError, match="another model, or was switched off"):
        model(tokens, past_key_values=old.new_cache())
    layer = LowRankLinear.from_factors(
        draw(20, 3), draw(3, 40), None, dtype=torch.float64, device="cpu"
    )
    swap_in(model, "model.layers.1.self_attn.k_proj", layer)
    with pytest.raises(ModelError, match="layers were replaced"):
        model(tokens)
