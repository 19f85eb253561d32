"""Sampling with a cache is sampling: the same numbers give the same tokens as a plain loop."""

from __future__ import annotations

import hashlib
from importlib import resources

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)

from spectrim.data.sampling import pick, sampled_tokens, uniforms
from spectrim.data.self_text import sample_windows, write_self_text
from spectrim.errors import NonFiniteError, TextError

SMALL = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=24, max_position_embeddings=64),
    "gemma2": Gemma2Config(
        **SMALL, intermediate_size=24, head_dim=8, num_key_value_heads=1, sliding_window=4
    ),
    "gpt2": GPT2Config(
        vocab_size=97, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=None
    ),
    "neox": GPTNeoXConfig(**SMALL, intermediate_size=24),
    "opt": OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64),
}


def tiny(name: str, *, seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).double().eval()
    # Sharper predictions than a fresh model's, so that an error in the cache shows.
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


@torch.no_grad()
def plain_loop(model, first, chances, temperature):
    """Whole prefix each step, and the definition of inversion written out."""
    ids = first.clone()
    for step in range(chances.shape[1]):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1].double() / temperature
        weights = torch.softmax(logits, -1)
        rows = []
        for row, chance in zip(weights, chances[:, step], strict=True):
            total, token = 0.0, 0
            for token, weight in enumerate(row.tolist()):  # noqa: B007
                total += weight
                if total > float(chance):
                    break
            rows.append(token)
        ids = torch.cat([ids, torch.tensor(rows)[:, None]], dim=1)
    return ids


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_cached_sampling_equals_the_plain_loop(name):
    model = tiny(name)
    found = sample_windows(model, windows=3, window_length=9, seed=4, batch=2, temperature=0.8)
    generator = torch.Generator().manual_seed(4)
    bos = model.generation_config.bos_token_id
    if bos is None:
        first = torch.randint(0, 97, (3, 1), generator=generator)
    else:
        first = torch.full((3, 1), bos)
    chances = uniforms(3, 8, generator=generator)
    assert torch.equal(found.ids, plain_loop(model, first, chances, 0.8))
    assert found.bos == ("none" if bos is None else "each")
    assert found.ids.dtype == torch.int64


def test_same_seed_same_bytes_whatever_the_batch():
    model = tiny("llama")
    options = {"windows": 5, "window_length": 10}
    a = sample_windows(model, **options, seed=1, batch=5)
    b = sample_windows(model, **options, seed=1, batch=2)
    c = sample_windows(model, **options, seed=2, batch=5)
    assert a.fingerprint() == b.fingerprint()
    assert a.fingerprint() != c.fingerprint()
    assert a.sources == ("self",)


def test_global_random_state_and_mode_are_left_alone():
    model = tiny("llama").train()
    before = torch.get_rng_state()
    sample_windows(model, windows=1, window_length=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_pick_follows_the_distribution():
    logits = torch.tensor([0.5, -1.0, 2.0, 0.0]).expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)
    chance = uniforms(20_000, 1, generator=generator)[:, 0]
    counts = torch.bincount(pick(logits, chance, temperature=2.0), minlength=4) / 20_000
    assert torch.allclose(counts, torch.softmax(logits[0] / 2.0, -1), atol=0.01)


def test_pick_never_leaves_the_support():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(2, 3)
    ends = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert pick(logits, ends, temperature=1.0).tolist() == [1, 1]


def test_greedy_is_argmax():
    model = tiny("llama")
    prompt = torch.tensor([[3, 5, 7]])
    tokens = torch.stack(list(sampled_tokens(model, prompt, steps=6, chances=None)), dim=1)
    ids = prompt
    for _ in range(6):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(tokens, ids[:, 3:])


def test_impossible_requests_are_named():
    model = tiny("llama")
    with pytest.raises(TextError, match=r"65 tokens.*64 positions"):
        sample_windows(model, windows=1, window_length=65)
    with pytest.raises(TextError, match="0 windows"):
        sample_windows(model, windows=0, window_length=8)
    with pytest.raises(TextError, match="temperature"):
        sample_windows(model, windows=1, window_length=8, temperature=0.0)
    model.lm_head.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError, match="1 of 1 sequences"):
        sample_windows(model, windows=1, window_length=8)


def test_write_self_text_writes_what_it_returns(tmp_path):
    class Letters:
        """Decodes an id to a letter; id 0 is special."""

        def batch_decode(self, rows, *, skip_special_tokens):
            assert skip_special_tokens
            return [" " + "".join(chr(97 + i % 26) for i in row[1:]) for row in rows]

    path = tmp_path / "self.txt"
    options = {"windows": 3, "window_length": 8, "seed": 2}
    content = write_self_text(tiny("llama"), Letters(), path, **options, separator="\n")
    assert path.read_text() == content
    assert [len(line) for line in content.splitlines()] == [7, 7, 7]


def test_the_bundled_text_is_as_large_as_its_card_says():
    content = resources.files("spectrim.demo").joinpath("calibration.txt").read_bytes()
    assert 400_000 < len(content) < 600_000
    from spectrim.demo.sample_calibration import SHA256, WINDOWS

    assert hashlib.sha256(content).hexdigest() == SHA256
    assert content.count(b"\n") >= WINDOWS
