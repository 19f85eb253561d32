"""Models are compared on the same prompts and the same dice; speeds are medians of real runs."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from spectrim.errors import InputError, TextError
from spectrim.evaluate.samples import continuations
from spectrim.serve import speed as speed_module
from spectrim.serve.speed import speed

VOCABULARY = {"</s>": 0, **{f"w{i}": i for i in range(1, 40)}}


def tokenizer():
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def tiny(seed: int = 0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


def test_greedy_equals_generate():
    model, words = tiny(), tokenizer()
    (sample,) = continuations({"m": model}, words, ["w3 w5 w8"], new_tokens=10)
    prompt = torch.tensor([[3, 5, 8]])
    expected = model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
    kept = [int(i) for i in expected[0, 3:] if int(i) != 0]
    assert list(sample.tokens) == kept
    assert sample.continuation.split() == [f"w{i}" for i in kept]


def test_equal_models_write_equal_words_and_seeds_differ():
    pair = {"a": tiny(), "b": tiny()}
    options = {"new_tokens": 12, "temperature": 1.0}
    a, b = continuations(pair, tokenizer(), ["w1 w2"], **options, seed=3)
    assert (a.model, b.model) == ("a", "b")
    assert a.tokens == b.tokens
    other = continuations(pair, tokenizer(), ["w1 w2"], **options, seed=4)
    assert other[0].tokens != a.tokens


def test_prompts_are_outermost_and_end_tokens_stop():
    model = tiny()
    model.lm_head.weight.data.zero_()  # every token alike: greedy takes id 0, the end
    samples = continuations({"a": model, "b": tiny()}, tokenizer(), ["w1", "w2"], new_tokens=3)
    assert [(s.prompt, s.model) for s in samples] == [
        ("w1", "a"),
        ("w1", "b"),
        ("w2", "a"),
        ("w2", "b"),
    ]
    assert samples[0].tokens == ()
    assert samples[0].continuation == ""


def test_prompts_that_cannot_be_continued_are_named():
    with pytest.raises(TextError, match="no tokens"):
        continuations({"m": tiny()}, tokenizer(), [""])
    with pytest.raises(TextError, match=r"24 tokens.*24 positions"):
        continuations({"m": tiny()}, tokenizer(), ["w1 " * 24])
    with pytest.raises(TextError, match="temperature"):
        continuations({"m": tiny()}, tokenizer(), ["w1"], temperature=-1.0)
    (sample,) = continuations({"m": tiny()}, tokenizer(), ["w1 " * 22], new_tokens=9)
    assert len(sample.tokens) <= 2


def test_speed_is_tokens_over_the_median_second(monkeypatch):
    runs = iter([(9.0, 9.0, 0), (1.0, 4.0, 0), (2.0, 8.0, 0), (4.0, 2.0, 128)])
    monkeypatch.setattr(speed_module, "_run", lambda *_: next(runs))
    found = speed(tiny(), prompt_length=10, new_tokens=6, batch=4, repeats=3, warmup=1)
    assert found.prefill == 4 * 10 / 2.0
    assert found.decode == 4 * 6 / 4.0
    assert found.cache_bytes == 128 / (4 * 16)


def test_speed_of_a_real_model_is_recorded_with_its_circumstances():
    record = speed(tiny(), prompt_length=8, new_tokens=4, repeats=1).record()
    assert record["prefill"] > 0
    assert record["decode"] > 0
    assert record["dtype"] == "float32"
    assert json.loads(json.dumps(record)) == record


def test_impossible_sizes_are_named():
    with pytest.raises(InputError, match="24 positions"):
        speed(tiny(), prompt_length=20, new_tokens=5)
    with pytest.raises(InputError, match="0 runs"):
        speed(tiny(), prompt_length=4, new_tokens=4, repeats=0)
