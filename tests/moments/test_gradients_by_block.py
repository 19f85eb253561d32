"""The pass that has one block in memory finds what the pass over the whole model finds."""

import pytest
import torch

from architectures import ARCHITECTURES
from gradient_cases import FP32_ONLY, by_block, prepared, recomputed
from spectrim.model.weights import get_module, read_weight
from spectrim.moments.gradients import gradient_pass
from spectrim.moments.gradients_by_block import spacing, streams_held

CLOSE, CLOSE_FP32 = 1e-9, 1e-3
"""Relative, of every number; none is near enough to zero to need more."""


def decomposed(model, target):
    U, s, Vh = torch.linalg.svd(read_weight(get_module(model, target.name)), full_matrices=False)
    return U, s[:, None] * Vh


@pytest.mark.parametrize("run", [by_block, recomputed])
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_it_finds_what_one_pass_over_the_whole_model_finds(name, run):
    model, anatomy, ids = prepared(name)
    factors = {t.name: decomposed(model, t) for t in anatomy.targets[::2]}
    options = {
        "needs": {"G", "fisher", "gradient"},
        "input_needs": {"C"},
        "factors": factors.get,
        "clip": 2.0,
    }
    whole = gradient_pass(model, anatomy, ids, batch=3, **options)
    close = CLOSE_FP32 if name in FP32_ONLY else CLOSE
    blocks = []
    for block, found in run(model, anatomy, ids, **options):
        blocks.append(block.index)
        expected = whole.of(block)
        assert found.loss == pytest.approx(whole.loss)
        assert found.tokens == whole.tokens
        for kind in ("outputs", "inputs", "scores"):
            assert getattr(found, kind).keys() == getattr(expected, kind).keys()
            for target, record_ in getattr(expected, kind).items():
                torch.testing.assert_close(
                    vars(getattr(found, kind)[target]), vars(record_), rtol=close, atol=0
                )
    assert sorted(blocks) == [b.index for b in anatomy.blocks]


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 7])
def test_any_number_of_blocks_falls_into_segments(blocks):
    model, anatomy, ids = prepared(num_hidden_layers=blocks)
    whole = gradient_pass(model, anatomy, ids, needs={"G"})
    seen = {}
    for _, found in by_block(model, anatomy, ids, needs={"G"}):
        seen |= found.outputs
    assert seen.keys() == whole.outputs.keys()
    for name, output in whole.outputs.items():
        torch.testing.assert_close(seen[name].G, output.G, rtol=CLOSE, atol=0)


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
    model, anatomy, ids = prepared(num_hidden_layers=9)
    for _ in by_block(model, anatomy, ids, needs={"G"}):
        pass
    assert most[0] <= streams_held(9) == 3 + 3 + 1
    assert spacing(80) == 9
    assert streams_held(80) == 19
