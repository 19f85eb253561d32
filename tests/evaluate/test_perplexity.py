"""Perplexity is the exponential of the mean loss, whatever the batches; its noise is known."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from spectrim.data.windows import given_windows
from spectrim.errors import InputError, NonFiniteError, TextError
from spectrim.evaluate import forward
from spectrim.evaluate.bootstrap import perplexity_difference
from spectrim.evaluate.perplexity import perplexity
from spectrim.model import tail

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=32,
)


def tiny(seed: int = 0):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5.0 if parameter.ndim > 1 else 1.0)
    return model


def token_windows(count: int = 7, length: int = 12, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 61, (count, length), generator=generator)


@torch.no_grad()
def brute_force(model, ids):
    """Mean loss per window, one window and one position at a time."""
    means = []
    for row in ids:
        logits = model(input_ids=row[None]).logits[0].double()
        losses = [F.cross_entropy(logits[t][None], row[t + 1][None]) for t in range(len(row) - 1)]
        means.append(torch.stack(losses).mean())
    return torch.stack(means)


def test_it_equals_cross_entropy_position_by_position():
    model, ids = tiny(), token_windows()
    found, expected = perplexity(model, ids), brute_force(model, ids)
    assert torch.allclose(found.per_window_nll, expected, rtol=1e-5)
    assert found.nll == pytest.approx(float(expected.mean()), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.nll))
    assert found.tokens == 7 * 11


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_the_batch_does_not_matter(batch):
    model, ids = tiny(), token_windows()
    whole = perplexity(model, ids, batch=7)
    assert perplexity(model, ids, batch=batch).nll == pytest.approx(whole.nll, rel=1e-6)


def test_pieces_do_not_matter(monkeypatch):
    model, ids = tiny(), token_windows()
    whole = perplexity(model, ids)
    monkeypatch.setattr(tail, "LOGITS_AT_ONCE", 61 * 4)
    monkeypatch.setattr(forward, "WHOLE_LOGITS", 0)
    assert torch.allclose(perplexity(model, ids).per_window_nll, whole.per_window_nll, rtol=1e-6)


def test_a_low_precision_model_is_scored_in_fp32():
    model, ids = tiny().bfloat16(), token_windows()
    with torch.no_grad():
        logits = model(input_ids=ids).logits.float()
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 61), ids[:, 1:].flatten())
    assert perplexity(model, ids).nll == pytest.approx(float(expected), rel=1e-5)
    assert perplexity(model, ids).protocol["dtype"] == "bfloat16"


def test_protocol_travels_with_the_number():
    windows = given_windows(token_windows(), name="mine")
    record = perplexity(tiny(), windows).record()
    assert record["protocol"]["fingerprint"] == windows.fingerprint()
    assert record["protocol"]["window_length"] == 12
    assert json.loads(json.dumps(record)) == record


def test_standard_error_is_that_of_the_mean_over_windows():
    found = perplexity(tiny(), token_windows())
    values = found.per_window_nll.tolist()
    mean = sum(values) / 7
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / 6 / 7)
    assert found.nll_standard_error == pytest.approx(spread)
    assert found.standard_error == pytest.approx(spread * found.perplexity)
    assert perplexity(tiny(), token_windows(1)).record()["standard_error"] is None


def test_a_window_with_a_bad_loss_is_named():
    model, ids = tiny(), token_windows()
    ids[ids == 60] = 0
    ids[4, 6] = 60

    def spoil(_, __, inputs, output):
        output.logits[inputs["input_ids"] == 60] = float("nan")

    model.register_forward_hook(spoil, with_kwargs=True)
    for batch in (1, 3, 8):
        with pytest.raises(NonFiniteError, match=r"window 4 of 7 .*'tensor'.* nan at position 7"):
            perplexity(model, ids, batch=batch)


def test_a_broken_model_is_an_error_not_an_overflow():
    model = tiny()
    model.lm_head.weight.data.mul_(1e6)
    with pytest.raises(NonFiniteError, match="nats per token"):
        perplexity(model, token_windows())


def test_windows_that_the_model_cannot_take_are_named():
    with pytest.raises(TextError, match=r"33 tokens.*32 positions"):
        perplexity(tiny(), token_windows(2, 33))
    with pytest.raises(TextError, match="61 embeddings"):
        perplexity(tiny(), token_windows() + 10)
    with pytest.raises(TextError, match="batch of 0"):
        perplexity(tiny(), token_windows(), batch=0)


def test_the_mode_is_restored():
    model = tiny().train()
    perplexity(model, token_windows())
    assert model.training


def generator():
    return torch.Generator().manual_seed(0)


def test_a_model_is_within_the_noise_of_itself():
    measured = perplexity(tiny(), token_windows(20))
    found = perplexity_difference(measured, measured, generator=generator())
    assert found.within_noise
    assert (found.nll, found.nll_low, found.nll_high) == (0.0, 0.0, 0.0)


def test_bootstrap_interval_matches_the_normal_one_for_many_windows():
    model, ids = tiny(), token_windows(300)
    other = copy.deepcopy(model)
    gen = torch.Generator().manual_seed(3)
    for p in other.parameters():
        p.data += 0.02 * p.data.std() * torch.randn(p.shape, generator=gen) if p.ndim > 1 else 0
    ours, theirs = perplexity(other, ids, batch=64), perplexity(model, ids, batch=64)
    found = perplexity_difference(ours, theirs, generator=generator(), resamples=4000)
    paired = ours.per_window_nll - theirs.per_window_nll
    error = float(paired.std()) / math.sqrt(300)
    assert found.nll == pytest.approx(float(paired.mean()), abs=1e-9)
    assert found.nll_standard_error == pytest.approx(error)
    assert found.nll_low == pytest.approx(found.nll - 1.96 * error, abs=0.15 * error)
    assert found.nll_high == pytest.approx(found.nll + 1.96 * error, abs=0.15 * error)
    # Pairing is the point: unpaired errors are many times larger.
    assert error < 0.3 * ours.nll_standard_error
    assert found.perplexity_low < found.perplexity < found.perplexity_high
    again = perplexity_difference(ours, theirs, generator=generator(), resamples=4000)
    assert again == found


def test_measurements_on_different_windows_are_not_compared():
    a, b = (perplexity(tiny(), token_windows(seed=s)) for s in (1, 2))
    with pytest.raises(InputError, match="different windows"):
        perplexity_difference(a, b, generator=generator())
    one = perplexity(tiny(), token_windows(1))
    with pytest.raises(InputError, match="at least 2 windows"):
        perplexity_difference(one, one, generator=generator())
