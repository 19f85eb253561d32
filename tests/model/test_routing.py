"""A router is what something is chosen from by rank, never what is as wide as there are experts."""

import pytest
import torch
from torch import nn

from architectures import family
from spectrim.model.routing import Choices
from spectrim.model.tracing import trace

LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 10,
}
MIXED = ["linear_attention", "full_attention"]
EXPERTS = {"moe_intermediate_size": 20, "num_experts_per_tok": 2}

# Numbers coincide on purpose: as many experts or filters as a projection has outputs.
DENSE = {
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"lru_width": 40, "num_key_value_heads": 1},
    "qwen3_5_text": LINEAR | {"layer_types": MIXED},
}
SPARSE = {
    "qwen3_next": (
        EXPERTS | LINEAR | {"layer_types": MIXED, "num_experts": 20},
        {"shared_expert_intermediate_size": 20},
        {"mlp.gate.weight"},
    ),
    "mixtral": ({"num_local_experts": 20}, {"intermediate_size": 28}, {"mlp.gate.weight"}),
    "jamba": (
        {"num_experts": 4, "expert_layer_period": 1, "expert_layer_offset": 0},
        {"attn_layer_period": 2, "attn_layer_offset": 1, "intermediate_size": 28},
        {"feed_forward.router.weight"},
    ),
    "deepseek_v3": (
        {"n_routed_experts": 20, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0},
        {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
        | {"v_head_dim": 10, "num_key_value_heads": 4, "head_dim": 8},
        {"mlp.gate.weight"},
    ),
    "phimoe": ({"num_local_experts": 20}, {"intermediate_size": 28}, {"mlp.router"}),
    "llama4_text": (
        {"num_local_experts": 20, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
        {"intermediate_size_mlp": 54},
        {"feed_forward.router"},
    ),
}


def routers(model):
    anatomy = trace(model, torch.arange(8)[None])
    found = {path for path, why in anatomy.left_alone.items() if "router" in why}
    return anatomy, {path.split(".", 3)[-1] for path in found}, found


@pytest.mark.parametrize("kind", DENSE)
def test_a_model_without_experts_has_no_router(kind):
    model = family(kind, **DENSE[kind])
    anatomy, kinds, _ = routers(model)
    assert kinds == set()
    targets = {t.name for t in anatomy.targets}
    small = {path for path, why in anatomy.left_alone.items() if "too small" in why}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    assert targets == linears - small


@pytest.mark.parametrize("kind", SPARSE)
def test_the_router_of_every_block_is_found_and_nothing_else(kind):
    experts, others, expected = SPARSE[kind]
    anatomy, kinds, found = routers(family(kind, **EXPERTS | experts | others))
    assert kinds == expected
    assert len(found) == len(anatomy.blocks)


def chosen(forward, **matrices):
    """Names of the matrices from whose products `forward` chooses."""
    module = nn.ParameterDict(
        {name: nn.Parameter(torch.randn(shape)) for name, shape in matrices.items()}
    )
    choices = Choices()
    choices.know("block", module)
    with torch.no_grad(), choices:
        forward(torch.randn(1, 8, 6), **module)
    return {name.removeprefix("block.") for name in choices.routers}


def test_what_softmax_bias_mask_cast_and_groups_make_of_it_is_still_chosen_from():
    def grouped(x, gate, bias):
        scores = nn.functional.linear(x.float(), gate.float()).sigmoid() + bias
        groups = scores.view(1, 8, 2, 2).topk(2)[0].sum(-1)
        mask = torch.zeros_like(groups).scatter_(-1, groups.topk(1)[1], 1).bool()
        return scores.view(1, 8, 2, 2).masked_fill(~mask[..., None], 0.0).flatten(2).argmax(-1)

    assert chosen(grouped, gate=(4, 6), bias=(4,)) == {"gate"}


def test_a_maximum_counts_only_where_its_place_is_used():
    def place(x, gate):
        values, places = (x @ gate.T).max(-1, keepdim=True)
        return values + places

    def stabiliser(x, gate):
        scores = x @ gate.T
        return (scores - scores.max(-1, keepdim=True)[0]).exp()

    assert chosen(place, gate=(4, 6)) == {"gate"}
    assert chosen(stabiliser, gate=(4, 6)) == set()


def test_scores_of_positions_do_not_make_routers_of_queries_and_keys():
    def sparse_attention(x, q, k, heads):
        scores = (x @ q.T) @ (x @ k.T).mT
        scores = (scores[..., None] * (x @ heads.T)[:, :, None]).sum(-1)
        return scores.topk(3)

    assert chosen(sparse_attention, q=(8, 6), k=(8, 6), heads=(2, 6)) == set()


def test_choosing_after_another_layer_blames_that_layer():
    def two_layers(x, first, second):
        return ((x @ first.T).relu() @ second.T).topk(2)

    assert chosen(two_layers, first=(5, 6), second=(4, 5)) == {"second"}
