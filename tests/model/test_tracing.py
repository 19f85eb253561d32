"""Targets and groups are what the architecture's equations say, whatever its modules are called."""

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, BLOCKS, VOCAB, tiny, windows
from spectrim.errors import ModelError
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = (QKV, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
EXPECTED = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"), GATED) | {
    "phi3": (("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), GATED[3]),
    "gpt2": (("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    "gpt_neox": (
        ("attention.query_key_value",),
        ("attention.dense",),
        ("mlp.dense_h_to_4h",),
        ("mlp.dense_4h_to_h",),
    ),
    "opt": (QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
    "mixtral": GATED[:2],
}
WITH_BIAS = {
    "qwen2": set(QKV),
    "gpt2": {p for g in EXPECTED["gpt2"] for p in g},
    "gpt_neox": {p for g in EXPECTED["gpt_neox"] for p in g},
    "opt": {p for g in EXPECTED["opt"] for p in g},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_targets_and_groups_are_exactly_the_expected_ones(name):
    model, _ = tiny(name)
    anatomy = trace(model, windows(1))
    assert len(anatomy.blocks) == BLOCKS
    for index, block in enumerate(anatomy.blocks):
        found = tuple(tuple(t.projection for t in group.targets) for group in block.groups)
        assert found == EXPECTED[name]
        for number, group in enumerate(block.groups):
            assert (group.block, group.index) == (index, number)
            for target in group.targets:
                assert (target.block, target.group) == (index, number)
                assert target.name == f"{block.name}.{target.projection}"
                assert target.bias == (target.projection in WITH_BIAS.get(name, ()))
                assert target.transposed == (name == "gpt2")
                weight = get_module(model, target.name).weight
                shape = (target.out_features, target.in_features)
                assert tuple(weight.shape) == (shape[::-1] if target.transposed else shape)
                assert group.in_features == target.in_features
    if name == "mixtral":
        kinds = {path.partition(".mlp.")[2] for path in anatomy.left_alone}
        assert kinds == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
        assert len(anatomy.left_alone) == 3 * BLOCKS
    else:
        assert anatomy.left_alone == {}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_tracing_leaves_no_hooks_and_no_mode_behind(name):
    model, _ = tiny(name)
    model.train()
    next(model.children()).eval()
    modes = [m.training for m in model.modules()]
    trace(model, windows(1))
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_hooks_are_removed_when_the_forward_fails():
    model, _ = tiny("llama")
    with pytest.raises(IndexError):
        trace(model, torch.full((1, 4), VOCAB))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Shell(nn.Module):
    """A bare model around some blocks that map (B, T, 6) to (B, T, 6)."""

    def __init__(self, *blocks):
        super().__init__()
        self.stack = nn.ModuleList(blocks)

    def forward(self, input_ids, use_cache):
        x = nn.functional.one_hot(input_ids, 6).float()
        for block in self.stack:
            x = block(x)
        return x


IDS = torch.tensor([[0, 1, 2, 3]])


class Odd(nn.Module):
    """One of every case that is not a target, and views that are."""

    def __init__(self):
        super().__init__()
        self.router, self.wide = nn.Linear(6, 3, bias=False), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(3))
        self.left, self.right, self.flat = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(6, 5)
        self.changed = nn.Linear(6, 5)
        self.twice, self.idle, self.narrow = nn.Linear(5, 5), nn.Linear(6, 6), nn.Linear(6, 1)
        self.tied, self.twin = nn.Linear(6, 6), nn.Linear(6, 6)
        self.twin.weight = self.tied.weight
        self.fused = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x):
        weights, chosen = (self.router(x).softmax(-1) + 0.5).topk(2)
        mixed = sum(weights[..., i : i + 1] * self.experts[e](x) for i, e in enumerate((2, 0)))
        mixed = mixed + self.wide(x).sum(-1, keepdim=True) + chosen.sum()
        h = (
            self.left(x)
            + self.right(x.view(*x.shape))
            + self.flat(x.flatten(0, 1)).view_as(x[..., :5])
        )
        out = mixed + self.twice(self.twice(h)).sum(-1, keepdim=True) * self.narrow(x)
        out = out + self.tied(x) + self.twin(x)
        x = x.clone()
        y = self.changed(x)
        x.mul_(2)
        return out + y.sum(-1, keepdim=True)


def test_everything_that_is_no_target_is_reported_with_its_reason():
    anatomy = trace(Shell(Odd(), Odd()), IDS)
    groups = [tuple(t.projection for t in g.targets) for g in anatomy.blocks[1].groups]
    # An expert that no token reached is read like the others; views of an input join its group.
    experts = [(f"experts.{i}.0",) for i in range(3)]
    assert groups == [*experts, ("wide", "left", "right", "flat"), ("changed",)]
    reasons = {
        path.removeprefix("stack.1."): why
        for path, why in anatomy.left_alone.items()
        if path.startswith("stack.1.")
    }
    expected = {
        "router": "top-k",
        "twice": "called 2 times",
        "idle": "never called",
        "narrow": "too small",
        "tied": "shared",
        "twin": "shared",
        "fused": "3-D parameter of Odd",
    }
    assert reasons.keys() == expected.keys()
    for path, words in expected.items():
        assert words in reasons[path]


class Scaled(nn.Linear):
    def forward(self, x):
        return 1.1 * super().forward(x)


class Spelled(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


def test_a_class_of_its_own_is_a_target_if_it_computes_what_a_linear_layer_does():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scaled, self.spelled = Scaled(6, 6), Spelled(6, 6)

        def forward(self, x):
            return self.scaled(x) + self.spelled(x)

    anatomy = trace(Shell(Own()), IDS)
    assert [t.projection for t in anatomy.targets] == ["spelled"]
    assert "a Scaled computes something else" in anatomy.left_alone["stack.0.scaled"]


class Routed(nn.Module):
    """Every expert runs, but each on its own tokens."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        return torch.cat([self.experts[0](x[:, :1]), self.experts[1](x[:, 1:])], dim=1)


def test_experts_that_see_some_tokens_are_known_as_experts():
    groups = trace(Shell(Routed()), IDS).blocks[0].groups
    assert [g.targets[0].projection for g in groups] == ["first", "experts.0.0", "experts.1.0"]
    assert [g.expert and g.expert.number for g in groups] == [None, 0, 1]
    assert {g.targets[0].matrix for g in groups[1:]} == {"experts.0"}


class Uneven(Routed):
    """One of the experts is called twice."""

    def forward(self, x):
        x = self.first(x)
        return torch.cat([self.experts[0](self.experts[0](x[:, :1])), x[:, 1:]], dim=1)


def test_experts_that_cannot_be_read_after_one_example_are_left_alone():
    anatomy = trace(Shell(Uneven()), IDS)
    assert [t.projection for t in anatomy.targets] == ["first"]
    assert all("called [2] times" in why for why in anatomy.left_alone.values())
    assert len(anatomy.left_alone) == 2


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x.clone()
        y = self.before(x)
        return y + self.after(x.add_(1))


def test_a_tensor_changed_in_place_is_another_input():
    groups = trace(Shell(InPlace()), IDS).blocks[0].groups
    assert [len(g.targets) for g in groups] == [1, 1]


class Fleeting(nn.Module):
    """Inputs that are freed at once, so that the allocator hands out the same memory again."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleList(nn.Linear(6, 6) for _ in range(20))

    def forward(self, x):
        return sum(step(x + i) for i, step in enumerate(self.steps))


def test_recycled_memory_does_not_join_groups():
    groups = trace(Shell(Fleeting()), IDS).blocks[0].groups
    assert [len(g.targets) for g in groups] == [1] * 20


class Nested(nn.Module):
    """A block that keeps its layers in a list of its own; no linear outside it."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(4))

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.parametrize("count", [1, 2])
def test_lists_inside_blocks_do_not_win(count):
    anatomy = trace(Shell(*(Nested() for _ in range(count))), IDS)
    assert [block.name for block in anatomy.blocks] == [f"stack.{i}" for i in range(count)]


def test_parallel_branches_share_a_group_across_the_block():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out, self.up = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.out(self.qkv(x)) + self.up(x)

    groups = trace(Shell(Parallel()), IDS).blocks[0].groups
    assert [tuple(t.projection for t in g.targets) for g in groups] == [("qkv", "up"), ("out",)]


def test_models_without_blocks_are_refused():
    with pytest.raises(ModelError, match=r"no nn\.ModuleList"):
        trace(Shell(nn.ReLU()), IDS)
    with pytest.raises(ModelError, match="can be compressed"):
        block = nn.Sequential(nn.Linear(6, 1))
        trace(Shell(block), IDS)
    with pytest.raises(ValueError, match="one window"):
        trace(Shell(Nested()), IDS.repeat(2, 1))
