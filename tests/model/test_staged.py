"""A resumed forward is the same forward, whatever is replaced while it waits."""

import copy
import gc
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, tiny, windows
from spectrim.errors import ModelError
from spectrim.model.anatomy import Group
from spectrim.model.capture import capture_inputs
from spectrim.model.gate import Gate
from spectrim.model.replay import record
from spectrim.model.staged import Staged
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module, replace_module

KEYS = [slice(0, 2), slice(2, 4), slice(4, 5)]


def prepared(name):
    model, _ = tiny(name)
    ids = windows(5)
    anatomy = trace(model, ids[:1])
    return record(model, ids, batch=2, anatomy=anatomy), anatomy


def stand_in(target, seed):
    """A random layer with the target's shape."""
    torch.manual_seed(seed)
    return nn.Linear(target.in_features, target.out_features)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def check_staged_equals_plain(replay, block):
    module = replay.block(block.index)

    def call(rows):
        return replay.run(block.index, module, replay.stream.read(rows))

    seen = {}
    with capture_inputs(module, block.groups, lambda group, x: seen.update({group.index: x})):
        plain = [call(rows) for rows in KEYS]
    with Staged(module, block.groups) as staged:
        for i, rows in enumerate(KEYS):
            staged.start(i, partial(call, rows))
        for group in block.groups:
            inputs = [staged.advance(i) for i in range(len(KEYS))]
            assert torch.equal(inputs[-1].reshape(-1, group.in_features), seen[group.index])
        outputs = [staged.finish(i) for i in range(len(KEYS))]
    for one, other in zip(plain, outputs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_staged_equals_plain_forward(name):
    replay, anatomy = prepared(name)
    for block in anatomy.blocks:
        check_staged_equals_plain(replay, block)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replacing_between_pauses_equals_restarting(name):
    replay, anatomy = prepared(name)
    block = anatomy.blocks[1]
    module = copy.deepcopy(replay.block(1))
    restarted = copy.deepcopy(module)
    with Staged(module, block.groups) as staged:
        for i, k in enumerate(KEYS):
            staged.start(i, lambda k=k: replay.run(1, module, replay.stream.read(k)))
        for group in block.groups:
            inputs = [staged.advance(i) for i in range(len(KEYS))]
            # The independent answer: a whole new forward of a copy for every group and batch.
            for k, x in zip(KEYS, inputs, strict=True):
                found = []
                with capture_inputs(restarted, [group], lambda g, y, f=found: f.append(y)):
                    replay.run(1, restarted, replay.stream.read(k))
                torch.testing.assert_close(x.reshape(found[0].shape), found[0])
            for number, target in enumerate(group.targets):
                new = stand_in(target, 10 * group.index + number)
                assert staged.module(target) is staged.replace(target, new)
                replace_module(restarted, target.projection, new)
        outputs = [staged.finish(i) for i in range(len(KEYS))]
    for k, output in zip(KEYS, outputs, strict=True):
        expected = replay.run(1, restarted, replay.stream.read(k))
        torch.testing.assert_close(output, expected)
    for target in block.targets:
        held = get_module(module, target.projection)
        assert held is get_module(restarted, target.projection)


def test_each_forward_runs_once():
    replay, anatomy = prepared("llama")
    block, module = anatomy.blocks[0], replay.block(0)
    calls = []
    module.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    with Staged(module, block.groups) as staged:
        staged.start("a", lambda: replay.run(0, module, replay.stream.read(KEYS[0])))
        assert not calls
        for _ in block.groups:
            staged.advance("a")
        staged.finish("a")
    assert len(calls) == 1


def gates(module):
    return [m for m in module.modules() if isinstance(m, Gate)]


def test_exit_after_an_error_ends_forwards_and_removes_gates():
    replay, anatomy = prepared("gemma2")
    block, module = anatomy.blocks[0], replay.block(0)
    before = dict(module.named_modules())
    ended, held = [], []

    def call():
        hidden = replay.stream.read(KEYS[0])
        held.append(weakref.ref(hidden))
        try:
            return replay.run(0, module, hidden)
        finally:
            ended.append(True)

    new = stand_in(block.groups[0].targets[0], 0)

    def failing():
        with Staged(module, block.groups) as staged:
            for key in range(3):
                staged.start(key, call)
            staged.advance(0)
            staged.replace(block.groups[0].targets[0], new)
            staged.advance(1)
            raise LookupError("the caller fails")

    with pytest.raises(LookupError, match="the caller fails"):
        failing()
    assert ended == [True, True]  # the third was never started
    assert not gates(module)
    changed = {n for n, m in module.named_modules() if m is not before[n]}
    assert changed == {block.groups[0].targets[0].projection}
    gc.collect()
    assert all(ref() is None for ref in held)


def test_an_error_inside_a_forward_reaches_the_caller():
    replay, anatomy = prepared("opt")
    block, module = anatomy.blocks[0], replay.block(0)
    target = block.groups[1].targets[0]
    before = get_module(module, target.projection)

    def failing():
        with Staged(module, block.groups) as staged:
            staged.start(0, lambda: replay.run(0, module, replay.stream.read(KEYS[0])))
            staged.advance(0)
            staged.replace(target, nn.Linear(target.in_features + 1, 2))
            staged.advance(0)
            staged.finish(0)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        failing()
    assert not gates(module)
    assert get_module(module, target.projection) is not before


class Moody(nn.Module):
    """A block that changes the thread's switches while it calls its targets."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.moods = []

    def note(self):
        self.moods.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    def forward(self, x):
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.a(x)
            self.note()
        self.note()
        x = self.b(x.float())
        self.note()
        return x


def moody_groups(block):
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([block])

        def forward(self, input_ids, use_cache):
            return block(torch.nn.functional.one_hot(input_ids, 4).float())

    return trace(Root(), torch.tensor([[0, 1, 2]])).blocks[0].groups


def test_grad_mode_and_autocast_do_not_leak():
    block = Moody()
    groups = moody_groups(block)
    x = torch.randn(2, 3, 4)
    block(x)
    expected = [(True, True), (False, False), (False, False)]
    assert block.moods[-3:] == expected
    block.moods.clear()
    with Staged(block, groups) as staged:
        staged.start(0, lambda: block(x))
        staged.start(1, lambda: block(x))
        for group in groups:
            for key in (0, 1):
                staged.advance(key)
                assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == (False, False)
            # What the caller does between pauses must not leak into the forward either.
            with torch.enable_grad(), torch.autocast("cpu", dtype=torch.float16):
                if group.index == 1:
                    staged.finish(0)
                    assert torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
                    assert torch.get_autocast_dtype("cpu") == torch.float16
        staged.finish(1)
    assert sorted(block.moods) == sorted(expected * 2)
    assert not torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_killing_a_forward_inside_autocast_does_not_leak():
    block = Moody()
    groups = moody_groups(block)
    with Staged(block, groups) as staged:
        staged.start(0, lambda: block(torch.randn(2, 3, 4)))
        staged.advance(0)
    assert not torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


def test_gates_are_transparent_to_direct_calls_and_attributes():
    replay, anatomy = prepared("llama")
    block, module = anatomy.blocks[0], replay.block(0)
    hidden = replay.stream.read(KEYS[0])
    plain = replay.run(0, module, hidden)
    down = module.mlp.down_proj
    with Staged(module, block.groups):
        assert torch.equal(replay.run(0, module, hidden), plain)
        assert module.mlp.down_proj.weight is down.weight
        assert not hasattr(module.mlp.down_proj, "no_such_attribute")


def test_wrong_orders_are_refused():
    replay, anatomy = prepared("llama")
    block, module = anatomy.blocks[0], replay.block(0)
    with Staged(module, block.groups[::-1]) as staged:
        staged.start(0, lambda: replay.run(0, module, replay.stream.read(KEYS[0])))
        with pytest.raises(ValueError, match="under way already"):
            staged.start(0, lambda: None)
        with pytest.raises(RuntimeError, match="another order"):
            staged.advance(0)
    with Staged(module, block.groups) as staged:
        with pytest.raises(KeyError, match="no forward"):
            staged.advance(7)
        staged.start(0, lambda: replay.run(0, module, replay.stream.read(KEYS[0])))
        for _ in block.groups:
            staged.advance(0)
        with pytest.raises(RuntimeError, match="ended the block"):
            staged.advance(0)


def test_a_missing_target_changes_nothing():
    replay, anatomy = prepared("llama")
    module = replay.block(0)
    before = dict(module.named_modules())
    other = prepared("gpt2")[1].blocks[0].groups[0]
    groups = (anatomy.blocks[0].groups[0], Group(0, 1, 40, other.targets))
    with pytest.raises(ModelError, match=r"attn\.c_attn"):
        Staged(module, groups).__enter__()
    assert dict(module.named_modules()) == before
