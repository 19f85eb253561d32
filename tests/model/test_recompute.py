"""Recomputing activations costs time and memory, never a digit."""

import pytest
import torch

from architectures import tiny, windows
from gated_cases import gated_model, lessons_of
from spectrim.model.recompute import recomputed


def blocks_of(model):
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return list(lists[0])


def gradients(name, *, on):
    """Of gates, corrections and deviations, under dropout and two forward passes a step."""
    model, gated = gated_model(name, rank=2, dropout=0.3, deviation=True)
    for layer in gated.layers.values():
        torch.nn.init.normal_(layer.lora.up, generator=torch.Generator().manual_seed(0))
    lessons = lessons_of(model, batch=2, accumulate=2)
    scores = gated.scores("straight_through", scale=0.02, dtype=torch.float32)

    def prepare(turn):
        gated.draw_dropout(0, 7, turn)
        gated.bind_scores(scores, "straight_through", scale=0.02)

    with recomputed(blocks_of(model), on=on):
        loss = lessons.backward(0, "cross_entropy", prepare)
    trained = [scores, *(p for p in model.parameters() if p.grad is not None)]
    return loss, [p.grad for p in trained]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradients_are_the_same(name):
    (loss, plain), (again, recomputed_ones) = gradients(name, on=False), gradients(name, on=True)
    assert loss == again
    assert len(plain) == len(recomputed_ones) > 10
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed_ones, strict=True))


def saved_bytes(model, blocks, *, on):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with recomputed(blocks, on=on), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(windows(4), use_cache=False).logits.sum()
    return total


def test_blocks_keep_only_their_inputs():
    model, _ = tiny("llama")
    blocks = blocks_of(model)
    outside = saved_bytes(model, blocks, on=True)
    assert outside < 0.5 * saved_bytes(model, blocks, on=False)


def test_blocks_are_as_before_afterwards():
    model, _ = tiny("llama")
    blocks = blocks_of(model)
    with torch.no_grad():
        before = model(windows(2)).logits
        with recomputed(blocks):
            assert torch.equal(model(windows(2)).logits, before)
    assert all("forward" not in block.__dict__ for block in blocks)
