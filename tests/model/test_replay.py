"""Replaying all blocks is the model itself; nothing runs twice; nothing is left behind."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, tiny, windows
from spectrim.errors import ModelError, NonFiniteError
from spectrim.model.capture import capture_inputs
from spectrim.model.replay import record
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def replayed(replay, rows):
    hidden = replay.stream.read(rows)
    states = [hidden]
    for index in range(len(replay.names)):
        hidden = replay.run(index, replay.block(index), hidden)
        states.append(hidden)
    return states


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_replay_is_the_model(name):
    model, _ = tiny(name)
    ids = windows(5)
    replay = record(model, ids, batch=2)
    for rows in replay.stream.batches(3):
        expected = model(ids[rows], output_hidden_states=True)
        states = replayed(replay, rows)
        # The model reports its last hidden states after the final norm: `finish` covers those.
        for found, known in zip(states[:-1], expected.hidden_states, strict=False):
            close(found, known)
        close(replay.finish(states[-1]), expected.logits)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_replay_is_the_model_with_eager_attention(name):
    model, _ = tiny(name)
    model.set_attn_implementation("eager")
    ids = windows(3)
    replay = record(model, ids, batch=3)
    close(replay.finish(replayed(replay, slice(0, 3))[-1]), model(ids).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_finish_lets_gradients_through(name):
    model, _ = tiny(name)
    replay = record(model, windows(2), batch=2)
    hidden = replay.stream.read(slice(0, 2)).requires_grad_()
    with torch.enable_grad():
        replay.finish(hidden).square().sum().backward()
    assert hidden.grad.abs().min() > 0


def test_only_the_embedding_runs_for_all_windows():
    model, _ = tiny("llama")
    ids = windows(6)
    anatomy = trace(model, ids[:1])
    seen = {}
    for block in anatomy.blocks:
        get_module(model, block.name).mlp.register_forward_hook(
            lambda _m, _a, out, name=block.name: seen.setdefault(name, []).append(len(out))
        )
    record(model, ids, batch=2, anatomy=anatomy)
    assert seen == {block.name: [1] for block in anatomy.blocks}


def test_a_changed_copy_runs_with_the_recorded_arguments():
    model, _ = tiny("gemma3")
    ids = windows(2)
    replay = record(model, ids, batch=2)
    changed = copy.deepcopy(replay.block(1))
    changed.mlp.down_proj.weight.mul_(0.5)
    hidden = replay.run(0, replay.block(0), replay.stream.read(slice(0, 2)))
    ours = replay.run(1, changed, hidden)
    model.model.layers[1], seen = changed, []
    changed.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(ids)
    close(ours, seen[0])


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mixtral"])
def test_a_poisoned_window_names_the_block(name):
    model, _ = tiny(name)
    replay = record(model, windows(4), batch=2)
    states = replayed(replay, slice(0, 4))[1]
    states[2, 3, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=rf"'{replay.names[1]}'.*window\(s\) \[2\]"):
        replay.run(1, replay.block(1), states)


def test_a_broken_model_names_the_block_while_recording():
    model, _ = tiny("llama")
    model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1"):
        record(model, windows(2), batch=2)
    clean(model)
    model, _ = tiny("llama")
    model.model.embed_tokens.weight[5] = torch.nan
    ids = windows(2)
    ids[0], ids[1, 3] = 1, 5
    with pytest.raises(NonFiniteError, match=r"the embedding gives .*window\(s\) \[1\]"):
        record(model, ids, batch=2)
    clean(model)


def clean(model):
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())


def test_finish_restores_the_blocks_after_an_error():
    model, _ = tiny("llama")
    replay = record(model, windows(2), batch=2)
    with pytest.raises(RuntimeError):
        replay.finish(torch.zeros(2, 12, 7))
    clean(model)


def test_forwards_set_on_the_instance_come_back():
    model, _ = tiny("llama")
    block = model.model.layers[0]
    own = block.forward
    block.forward = own
    replay = record(model, windows(2), batch=2)
    replay.finish(replay.stream.read(slice(0, 2)))
    assert vars(block)["forward"] is own


def test_a_mapped_stream_holds_the_same_states(tmp_path):
    model, _ = tiny("llama")
    memory = record(model, windows(3), batch=2).stream
    mapped = record(model, windows(3), batch=2, folder=tmp_path).stream
    assert torch.equal(memory.read(slice(0, 3)), mapped.read(slice(0, 3)))
    assert len(list(tmp_path.iterdir())) == 1


class Linked(nn.Module):
    """A model whose blocks get something besides hidden states, or are not chained directly."""

    def __init__(self, *, leak, scale):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.layers = nn.ModuleList(Adding() for _ in range(2))
        self.leak, self.scale = leak, scale

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids)
        extra = x if self.leak else torch.ones(1, 1, 6)
        for layer in self.layers:
            x = layer(x * self.scale, [extra])[0]
        return SimpleNamespace(logits=x)

    def get_output_embeddings(self):
        return None


class Adding(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, extra):
        return self.linear(x) + extra[0], "more", None


def test_models_that_cannot_be_replayed_are_refused():
    ids = windows(3, 5, vocab_size=9)
    replay = record(Linked(leak=False, scale=1), ids, batch=2)
    assert [call.extras for call in replay.calls] == [2, 2]
    with pytest.raises(ModelError, match="depend on the tokens"):
        record(Linked(leak=True, scale=1), ids, batch=2)
    with pytest.raises(ModelError, match=r"between 'layers\.0' and 'layers\.1'"):
        record(Linked(leak=False, scale=2), ids, batch=2)


def test_bad_windows_are_refused():
    model, _ = tiny("llama")
    for bad in (windows(2)[:0], windows(2)[0], windows(2).int()):
        with pytest.raises(ValueError, match="int64"):
            record(model, bad, batch=2)
    replay = record(model, windows(2), batch=2)
    with pytest.raises(ValueError, match="recorded with 12"):
        replay.run(0, replay.block(0), replay.stream.read(slice(0, 2))[:, :5])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_captured_inputs_are_what_every_target_of_the_group_reads(name):
    model, _ = tiny(name)
    ids = windows(2)
    anatomy = trace(model, ids[:1])
    replay = record(model, ids, batch=2, anatomy=anatomy)
    block, module = anatomy.blocks[0], replay.block(0)
    known, handles = {}, []
    for target in block.targets:
        handles.append(
            get_module(model, target.name).register_forward_hook(
                lambda _m, args, _o, name=target.name: known.update({name: args[0]})
            )
        )
    found = {}
    with capture_inputs(module, block.groups, lambda group, x: found.update({group.index: x})):
        replay.run(0, module, replay.stream.read(slice(0, 2)))
    for handle in handles:
        handle.remove()
    assert set(found) == {group.index for group in block.groups}
    for target in block.targets:
        assert found[target.group].shape == (24, target.in_features)
        assert torch.equal(found[target.group], known[target.name].flatten(0, -2))
    clean(model)


def test_capture_hooks_are_removed_after_an_error():
    model, _ = tiny("llama")
    anatomy = trace(model, windows(1))

    def failing():
        with capture_inputs(model.model.layers[0], anatomy.blocks[0].groups, lambda *_: None):
            raise LookupError

    with pytest.raises(LookupError):
        failing()
    clean(model)
