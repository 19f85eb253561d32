"""Divergence and agreement of two models equal their definitions, also along the window."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from spectrim.errors import ModelError, NonFiniteError
from spectrim.evaluate.agreement import agreement

VOCABULARY = 53


def tiny(seed: int, vocabulary: int = VOCABULARY):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


IDS = torch.randint(0, VOCABULARY, (5, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_definition(dense, compressed):
    p = torch.softmax(dense(input_ids=IDS).logits.double(), -1)
    q = torch.softmax(compressed(input_ids=IDS).logits.double(), -1)
    return (p * (p / q).log()).sum(-1), (p.argmax(-1) == q.argmax(-1)).double()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_equals_the_definition(batch):
    dense, compressed = tiny(0), tiny(1)
    kl, match = by_definition(dense, compressed)
    found = agreement(dense, compressed, IDS, batch=batch)
    assert found.kl == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found.top1 == pytest.approx(float(match.mean()))
    assert torch.allclose(found.kl_by_position, kl.mean(0), rtol=1e-4)
    assert torch.allclose(found.top1_by_position, match.mean(0))
    assert torch.allclose(found.kl_by_window, kl.mean(1), rtol=1e-4)
    assert found.kl_standard_error == pytest.approx(float(kl.mean(1).std()) / 5**0.5, rel=1e-4)


def test_a_model_agrees_with_itself():
    found = agreement(tiny(0), tiny(0), IDS)
    assert found.kl == 0.0
    assert found.top1 == 1.0


def test_stretches_average_to_the_whole():
    found = agreement(tiny(0), tiny(1), IDS)
    rows = found.by_depth(4)
    assert [(r["from"], r["to"]) for r in rows] == [(0, 2), (2, 4), (4, 7), (7, 9)]
    total = sum(r["kl"] * (r["to"] - r["from"]) for r in rows) / 9
    assert total == pytest.approx(found.kl)
    assert len(found.by_depth(100)) == 9
    record = found.record()
    assert json.loads(json.dumps(record)) == record


def test_other_vocabularies_are_refused():
    with pytest.raises(ModelError, match=r"53 tokens.*57"):
        agreement(tiny(0), tiny(1, 57), IDS)


def test_a_bad_divergence_is_named():
    broken = tiny(1)
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteError, match="window 0 of 5"):
        agreement(tiny(0), broken, IDS)
