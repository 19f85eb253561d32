"""A model written with other channel scales is compressed to the same function by every recipe."""

import copy

import pytest
import torch

from architectures import tiny, windows
from spectrim import api
from spectrim.recipes import get_recipe

RECIPES = {
    "fwsvd": {},
    "asvd": {"decompose": {"alpha": 1.0}, "allocate": {"score": "energy"}},
    "svd-llm": {},
    "svd-llm-v2": {},
    "svd-llm-update": {},
    "aa-svd": {"refine": []},
    "zs-svd": {"refine": [{"step": "projected_gradient", "stages": 2}]},
    "spectrim": {},
}
"""Without `svd` and `asvd` as published, which see weights as they are written, and training."""

OUTPUTS_TOO = {"spectrim"}
"""Recipes that know what outputs are worth, whatever unit they are in."""


def rescaled(model, *, outputs):
    """Powers of two on the channels of every norm and, if asked, on those between up and down."""
    model = copy.deepcopy(model)
    g = torch.Generator().manual_seed(0)

    def powers(count):
        return 2.0 ** torch.randint(-8, 9, (count,), generator=g)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = (attention.q_proj, attention.k_proj, attention.v_proj)
        for norm, linears in (
            (layer.input_layernorm, readers),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            d = powers(len(norm.weight))
            norm.weight.data *= d
            for linear in linears:
                linear.weight.data /= d
        if outputs:
            d = powers(mlp.up_proj.out_features)
            mlp.up_proj.weight.data *= d[:, None]
            mlp.down_proj.weight.data /= d
    return model


@pytest.mark.parametrize("tokens", [384, 36])
@pytest.mark.parametrize("name", RECIPES)
def test_rescaled_channels_change_nothing(name, tokens):
    model = tiny("llama")[0]
    other = rescaled(model, outputs=name in OUTPUTS_TOO)
    recipe = get_recipe(name).with_changes(**RECIPES[name])
    probe, text = windows(2, seed=9), windows(tokens // 12)
    with torch.no_grad():
        expected = model(input_ids=probe).logits
        assert torch.allclose(other(input_ids=probe).logits, expected, rtol=1e-5, atol=1e-6)
        options = {"recipe": recipe, "keep": 0.5, "text": text, "measure": False}
        ours, theirs = (api.compress(one, **options) for one in (model, other))
        assert [e.rank for e in theirs.plan.entries] == [e.rank for e in ours.plan.entries]
        found = theirs.model(input_ids=probe).logits
        expected = ours.model(input_ids=probe).logits
    assert torch.dist(found, expected) < 1e-3 * expected.norm()
