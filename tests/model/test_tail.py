"""Losses piece by piece are those of all logits at once, and so are their gradients."""

import pytest
import torch

from architectures import BLOCKS, tiny, windows
from spectrim.errors import ModelError
from spectrim.model import tail as module
from spectrim.model.losses import divergence, next_token
from spectrim.model.tail import Tail, blocks_in_sequence, pieces
from spectrim.model.tracing import trace

NAMES = ["llama", "gpt2", "opt", "gemma3", "gpt_neox"]


def prepared(name):
    model, _ = tiny(name)
    model.double().eval()
    ids = windows(3, 12)
    names = [block.name for block in trace(model, ids[:1]).blocks]
    return model, Tail.find(model, names, ids), ids


def whole_loss(model, ids):
    flat = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten(), reduction="sum")


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_in_pieces_is_the_whole_loss(name, monkeypatch):
    model, tail, ids = prepared(name)
    assert tail.by_token
    assert blocks_in_sequence(model, ids[:1, :8]) == tail.names
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 5 * tail.vocabulary)
    assert len(list(tail.pieces(torch.empty(3, 12, 1)))) == 9
    embedded = model.get_input_embeddings().weight
    found = tail.total(tail.states(ids)[:, :-1], next_token(ids))
    expected = whole_loss(model, ids)
    torch.testing.assert_close(found, expected)
    # Through the blocks to the embedding. A tied head gets no gradient by pieces, so the weight
    # that the head multiplies with is another one here.
    model.get_output_embeddings().weight = torch.nn.Parameter(embedded.detach().clone())
    found = tail.total(tail.states(ids)[:, :-1], next_token(ids))
    expected = whole_loss(model, ids)
    gradients = [torch.autograd.grad(loss, embedded)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_divergence_in_pieces_is_the_whole_divergence(monkeypatch):
    _model, tail, ids = prepared("llama")
    with torch.no_grad():
        hidden = tail.states(ids)
        other = hidden + torch.linspace(-0.3, 0.3, hidden.numel()).view_as(hidden)
        log_p, log_q = (tail.logits(h).log_softmax(-1) for h in (hidden, other))
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 7 * tail.vocabulary)
    found = tail.total(other, divergence(tail, hidden))
    torch.testing.assert_close(found, (log_p.exp() * (log_p - log_q)).sum())


def test_the_routers_of_bypassed_blocks_are_not_asked_for_a_balance():
    model, _ = tiny("mixtral", output_router_logits=True)
    ids = windows(1)
    expected = model(input_ids=ids, use_cache=False, output_router_logits=False).logits
    tail = Tail.find(model, [f"model.layers.{i}" for i in range(BLOCKS)], ids)
    torch.testing.assert_close(tail.logits(tail.states(ids)), expected)


def test_pieces_cover_everything_once():
    for count, length, vocabulary in [(1, 1, 10), (5, 7, 2**22), (5, 7, 2**24), (3, 4, 2**30)]:
        seen = torch.zeros(count, length)
        for rows, positions in pieces(count, length, vocabulary):
            seen[rows, positions] += 1
            assert seen[rows, positions].numel() <= max(1, module.LOGITS_AT_ONCE // vocabulary)
        assert torch.equal(seen, torch.ones(count, length))


class Mixed(torch.nn.Module):
    """A head that mixes positions: the mean over the window is added to every token's logits."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + x.mean(1, keepdim=True))


def test_a_head_that_mixes_tokens_gets_whole_windows():
    model, _, ids = prepared("llama")
    model.lm_head = Mixed(model.lm_head)
    tail = Tail.find(model, [f"model.layers.{i}" for i in range(BLOCKS)], ids)
    assert tail.faithful and not tail.by_token
    assert {(p.start, p.stop) for _, p in tail.pieces(torch.empty(3, 12, 1))} == {(0, 12)}


def test_logits_that_depend_on_more_than_the_states_are_refused():
    model, _, ids = prepared("llama")

    def bypass(_module, args, kwargs, output):
        output.logits = output.logits + kwargs["input_ids"][..., None]
        return output

    model.register_forward_hook(bypass, with_kwargs=True)
    tail = Tail.find(model, [f"model.layers.{i}" for i in range(BLOCKS)], ids)
    with pytest.raises(ModelError, match="hidden states behind its last block"):
        tail.total(torch.zeros(1, 4, 40).double(), next_token(ids))
