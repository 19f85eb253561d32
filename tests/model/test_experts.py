"""Experts in one parameter: found by what is done with them, taken apart and put back exactly."""

import pytest
import torch
from torch import nn

from architectures import MIXTURES, mixture, windows
from spectrim.errors import ModelError
from spectrim.model.experts.layout import ExpertLayout
from spectrim.model.experts.stack import ExpertStack
from spectrim.model.experts.unfold import expert_stacks, fold, unfold
from spectrim.model.experts.watching import find_experts
from spectrim.model.tracing import trace

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
CLOSE = 1e-4  # of the largest logit: sums of fp32 products in another order


def opened(kind):
    model = mixture(kind)
    layouts, reasons = find_experts(model, torch.arange(8)[None])
    unfold(model, layouts)
    return model, layouts, reasons


@pytest.mark.parametrize("kind", MIXTURES)
def test_single_layers_compute_what_the_parameters_did_and_fold_back_to_the_same_bits(kind):
    model, ids = mixture(kind), windows(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
    layouts, reasons = find_experts(model, ids[:1, :8])
    assert layouts and not reasons
    unfold(model, layouts)
    assert not any(p.ndim == 3 for p in model.parameters())
    for implementation in IMPLEMENTATIONS:
        if model._can_set_experts_implementation():
            model.set_experts_implementation(implementation)
        with torch.no_grad():
            found = model(ids, use_cache=False).logits
        assert (found - dense).abs().max() < CLOSE * dense.abs().max(), implementation
    fold(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("kind", MIXTURES)
def test_nearly_all_parameters_of_the_blocks_are_targets(kind):
    model, _, _ = opened(kind)
    anatomy = trace(model, torch.arange(8)[None])
    blocks = [model.get_submodule(block.name) for block in anatomy.blocks]
    total = sum(p.numel() for block in blocks for p in block.parameters())
    covered = sum(t.out_features * t.in_features for t in anatomy.targets)
    assert covered / total >= 0.95
    assert not any("expert" in why for why in anatomy.left_alone.values())


def test_layouts_say_how_the_matrices_lie():
    for kind, gate_up, transposed in (
        ("mixtral", "stacked", False),
        ("gpt_oss", "interleaved", True),
        ("llama4_text", "stacked", True),
    ):
        layouts = opened(kind)[1]
        first = next(layout for name, layout in layouts.items() if "gate_up" in name)
        second = next(layout for name, layout in layouts.items() if "down" in name)
        assert (first.parts, first.transposed) == (gate_up, transposed), kind
        assert (second.parts, second.transposed) == ("whole", transposed), kind


def test_gate_and_up_of_an_expert_read_the_same_tokens_and_experts_come_in_their_order():
    model, _, _ = opened("mixtral")
    block = trace(model, torch.arange(8)[None]).blocks[0]
    experts = [group for group in block.groups if group.expert is not None]
    assert [len(group.targets) for group in experts] == [2] * 5 + [1] * 5
    assert [group.expert.number for group in experts] == [0, 1, 2, 3, 4] * 2
    assert [len(stage) for stage in block.stages] == [1, 1, 5, 5]
    first, last = experts[0].expert, experts[-1].expert
    assert (first.reads_common, first.writes_common) == (True, False)
    assert (last.reads_common, last.writes_common) == (False, True)


@pytest.mark.parametrize("parts", ["whole", "stacked", "interleaved"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_layout_joins_what_it_split(parts, transposed):
    layout = ExpertLayout(3, 8, 5, transposed, parts)
    parameter = nn.Parameter(torch.randn(layout.shape, generator=torch.Generator().manual_seed(0)))
    stack = ExpertStack.of(parameter, layout)
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for expert, member in enumerate(stack):
        W = parameter[expert].mT if transposed else parameter[expert]
        assert torch.allclose(member(x), x @ W.mT, atol=1e-6)
    assert torch.equal(stack.folded(), parameter)


class Scaled(nn.Module):
    """Does with its weights what no product with tokens is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 4, 4))

    def forward(self, x):
        return x * self.weight.sum()


def test_parameters_that_multiply_no_tokens_are_left_alone_with_the_reason():
    model = Scaled()
    layouts, reasons = find_experts(model, torch.ones(2, 4), run=lambda module, x: module(x))
    assert not layouts
    assert "multiply no tokens" in reasons["weight"]


def test_an_unknown_use_of_single_layers_is_an_error_that_names_it():
    layout = ExpertLayout(3, 4, 4, False, "whole")
    stack = ExpertStack.of(torch.ones(3, 4, 4), layout)
    with pytest.raises(ModelError, match="outer"):
        torch.outer(stack, torch.ones(4))
    with pytest.raises(ModelError, match="orientation"):
        torch.ones(2, 4) @ stack[0]


def test_a_layout_of_another_shape_is_refused():
    model = mixture("mixtral")
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(ModelError, match="expected a parameter of shape"):
        unfold(model, {name: ExpertLayout(4, 40, 28, False, "whole")})
    assert not expert_stacks(model)
