"""The pass that has one block in memory finds what the pass over the whole model finds."""

from contextlib import contextmanager

import pytest
import torch

from architectures import ARCHITECTURES, tiny, windows
from spectrim.errors import NonFiniteError
from spectrim.model.replay import record
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module, read_weight
from spectrim.moments.gradients import gradient_pass
from spectrim.moments.gradients_by_block import gradients_by_block, spacing, streams_held

T = 12
FP32_ONLY = {"mixtral"}  # torch multiplies groups of experts in no wider dtype


def case(name="llama", count=4, **config):
    model, _ = tiny(name, **config)
    if name not in FP32_ONLY:
        model.double()
    ids = windows(count, T)
    return model, trace(model, ids[:1]), ids


@contextmanager
def in_memory(model, block):
    yield get_module(model, block.name)


def by_block(model, anatomy, ids, **options):
    replay = record(model, ids, batch=3, device="cpu", anatomy=anatomy)
    return gradients_by_block(
        replay, anatomy, ids, at_hand=lambda b: in_memory(model, b), batch=3, **options
    )


def decomposed(model, target):
    U, s, Vh = torch.linalg.svd(read_weight(get_module(model, target.name)), full_matrices=False)
    return U, s[:, None] * Vh


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_it_finds_what_one_pass_over_the_whole_model_finds(name):
    model, anatomy, ids = case(name)
    factors = {t.name: decomposed(model, t) for t in anatomy.targets[::2]}
    options = {
        "needs": {"G", "fisher", "gradient"},
        "input_needs": {"C"},
        "factors": factors.get,
        "clip": 2.0,
    }
    whole = gradient_pass(model, anatomy, ids, batch=3, **options)
    close = {"rtol": 1e-9, "atol": 1e-12} if name not in FP32_ONLY else {"rtol": 1e-3, "atol": 1e-5}
    blocks = []
    for block, found in by_block(model, anatomy, ids, **options):
        blocks.append(block.index)
        expected = whole.of(block)
        assert found.loss == pytest.approx(whole.loss)
        assert found.tokens == whole.tokens
        for kind in ("outputs", "inputs", "scores"):
            assert getattr(found, kind).keys() == getattr(expected, kind).keys()
            for target, record_ in getattr(expected, kind).items():
                torch.testing.assert_close(
                    vars(getattr(found, kind)[target]), vars(record_), **close
                )
    assert blocks == [b.index for b in reversed(anatomy.blocks)]


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 7])
def test_any_number_of_blocks_falls_into_segments(blocks):
    model, anatomy, ids = case(num_hidden_layers=blocks)
    whole = gradient_pass(model, anatomy, ids, needs={"G"})
    seen = {}
    for _, found in by_block(model, anatomy, ids, needs={"G"}):
        seen |= found.outputs
    assert seen.keys() == whole.outputs.keys()
    for name, output in whole.outputs.items():
        torch.testing.assert_close(seen[name].G, output.G, rtol=1e-9, atol=1e-12)


def test_no_more_streams_are_held_than_promised(monkeypatch):
    from spectrim.model import stream

    living, most = set(), [0]
    original = stream.Stream.__init__

    def counted(self, states, path=None):
        original(self, states, path)
        stream.weakref.finalize(self, living.discard, id(self))
        living.add(id(self))
        most[0] = max(most[0], len(living))

    monkeypatch.setattr(stream.Stream, "__init__", counted)
    model, anatomy, ids = case(num_hidden_layers=9)
    for _ in by_block(model, anatomy, ids, needs={"G"}):
        pass
    assert most[0] <= streams_held(9) == 3 + 3 + 1
    assert spacing(80) == 9
    assert streams_held(80) == 19


def test_the_model_is_left_as_it_was():
    model, anatomy, ids = case(count=2)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    for _ in by_block(model, anatomy, ids, needs={"G"}):
        assert all(m.training for m in model.modules())
    assert {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()} == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_a_gradient_that_is_not_finite_is_refused_by_name():
    model, anatomy, ids = case(count=2)
    name = anatomy.blocks[0].targets[1].name
    module = get_module(model, name)
    handle = module.register_full_backward_pre_hook(lambda _m, g: (g[0] * float("nan"),))
    with pytest.raises(NonFiniteError, match=f"non-finite gradient at {name}"):
        list(by_block(model, anatomy, ids, needs={"G"}))
    handle.remove()
