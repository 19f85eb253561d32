"""Protected targets stay bit for bit, own sizes are met, and the others share what remains."""

from __future__ import annotations

import pytest
import torch

from architectures import BLOCKS, tiny, windows
from jobs import copied
from spectrim import api
from spectrim.allocate.budget import Shape, budget_bytes, layer_bytes
from spectrim.errors import BudgetError, InputError, RecipeError
from spectrim.model.choosing import choose_targets
from spectrim.model.tracing import trace
from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe

FIRST = "model.layers.0.*"
FLOWS = {
    "one-shot": get_recipe("svd-llm"),
    "planned": get_recipe("svd-llm").with_changes(allocate={"rule": "knapsack"}),
    "sequential": get_recipe("aa-svd").with_changes(refine=[]),
    "default": get_recipe("spectrim").with_changes(allocate={"gradient_windows": 4}),
}


def compressed(model, recipe=FLOWS["one-shot"], **options):
    return api.compress(
        model, recipe=recipe, keep=0.6, text=windows(8), measure=False, dtype="float32", **options
    )


@pytest.mark.parametrize("flow", FLOWS)
def test_protected_layers_stay_and_the_others_keep_what_was_asked_for(flow):
    model, _ = tiny("llama")
    before = copied(model)
    skip = (FIRST, "*.down_proj")
    result = compressed(model, FLOWS[flow], skip=skip)
    names = [entry.name for entry in result.plan.entries]
    protected = {t.name for t in trace(before, windows(1)).targets} - set(names)
    assert names and protected
    for name in protected:
        assert name.startswith("model.layers.0.") or name.endswith(".down_proj")
        assert torch.equal(
            before.get_submodule(name).weight, result.model.get_submodule(name).weight
        )
        assert "skip" in result.report["left_alone"][name]
    keep = result.report["keep"]
    assert 0.5 < keep["achieved"] <= 0.6
    stored = keep["target_bytes"]["stored"]
    extra = sum(4 * before.get_submodule(name).weight.numel() for name in protected)
    whole = keep["target_bytes"]["dense"] + extra
    assert keep["with_protected"] == pytest.approx((stored + extra) / whole)


def test_only_is_the_complement_of_skip():
    anatomy = trace(tiny("llama")[0], windows(1))
    only = choose_targets(anatomy, ["*.mlp.*"], [])
    skip = choose_targets(anatomy, [], ["*.self_attn.*"])
    assert [t.name for t in only.targets] == [t.name for t in skip.targets]
    both = choose_targets(anatomy, ["*.mlp.*"], [FIRST])
    assert {t.block for t in both.targets} == set(range(1, BLOCKS))
    for block in both.blocks:
        assert [g.index for g in block.groups] == list(range(len(block.groups)))
        assert all(t.group == g.index for g in block.groups for t in g.targets)


def test_patterns_that_fit_nothing_or_everything_are_refused():
    anatomy = trace(tiny("llama")[0], windows(1))
    with pytest.raises(InputError, match=r"'model\.layer\.0\.\*' fits none .* one of them is"):
        choose_targets(anatomy, [], ["model.layer.0.*"])
    with pytest.raises(InputError, match=f"leave none of the {7 * BLOCKS}"):
        choose_targets(anatomy, [], ["*"])
    with pytest.raises(InputError, match="'x' fits none"):
        compressed(tiny("llama")[0], own_recipe({"match": "x", "keep": 0.5}))


def own_recipe(*own, rule="uniform", **changes):
    base = get_recipe("svd-llm").with_changes(allocate={"rule": rule, "fill": True})
    return base.with_changes(targets={"own": list(own)}, **changes)


@pytest.mark.parametrize("rule", ["uniform", "loss_ratio", "knapsack", "zero_sum"])
def test_own_sizes_are_met_and_the_whole_budget_holds(rule):
    recipe = own_recipe(
        {"match": "*.1.self_attn.*", "rank": 5},
        {"match": "*.down_proj", "keep": 0.8},
        {"match": "*.up_proj", "keep": 1},
        rule=rule,
    )
    result = compressed(tiny("llama")[0], recipe)
    dense = stored = 0
    for entry in result.plan.entries:
        dense, stored = dense + entry.dense_bytes, stored + entry.bytes
        if ".1.self_attn." in entry.name:
            assert entry.rank == 5
        elif entry.name.endswith("up_proj"):
            assert entry.rank is None
        elif entry.name.endswith("down_proj"):
            shape = Shape(40, 54)
            allowed = budget_bytes(0.8, entry.dense_bytes)
            more = layer_bytes(shape, rank=entry.rank + 1, storage="factored", dtype_bytes=4)
            assert entry.bytes <= allowed < more
    assert 0.55 * dense < stored <= budget_bytes(0.6, dense)
    assert any("size of their own" in note for note in result.report["notes"])


def test_a_storage_of_its_own_is_used_and_still_planned():
    recipe = own_recipe({"match": "*.mlp.*", "storage": "packed"})
    result = compressed(tiny("llama")[0], recipe)
    for entry in result.plan.entries:
        if entry.rank is not None:
            assert (entry.storage == "packed") == (".mlp." in entry.name)
    assert result.plan.achieved_keep <= 0.6


def test_sizes_that_cannot_be_are_named():
    for own, words in (
        ({"match": "*.q_proj", "rank": 30}, r"q_proj cannot have rank 30 .* up to \d+ or dense"),
        ({"match": "*.q_proj", "keep": 0.001}, "cannot keep 0.001"),
        ({"match": "*_proj", "keep": 0.9}, "size of their own take"),
    ):
        with pytest.raises(BudgetError, match=words):
            compressed(tiny("llama")[0], own_recipe(own))
    for own in ({"match": "*"}, {"match": "*", "keep": 0.5, "rank": 3}):
        with pytest.raises(RecipeError, match=r"targets\.own\.0"):
            own_recipe(own)
    with pytest.raises(RecipeError, match="one order for all"):
        compressed(
            tiny("llama")[0],
            get_recipe("acip").with_changes(targets={"own": [{"match": "*", "keep": 0.5}]}),
        )


def test_ranks_are_multiples_where_asked_for():
    result = compressed(tiny("llama")[0], multiple=4)
    ranks = [entry.rank for entry in result.plan.entries if entry.rank is not None]
    assert ranks and all(rank % 4 == 0 for rank in ranks)


def test_a_recipe_that_chooses_nothing_keeps_its_hash_and_a_choice_changes_it():
    plain = get_recipe("svd-llm")
    data = plain.model_dump(mode="json")
    data.pop("targets")
    assert Recipe.model_validate(data).hash() == plain.hash()
    assert plain.with_changes(targets={"skip": ["*"]}).hash() != plain.hash()
    assert (
        Recipe.from_yaml(own_recipe({"match": "*", "rank": 3}).to_yaml()).targets.own[0].rank == 3
    )


def test_a_recipe_written_before_a_field_went_is_read_unless_it_asks_for_what_is_gone():
    data = get_recipe("spectrim").model_dump(mode="json")
    data["allocate"]["probe_windows"] = 0
    assert Recipe.model_validate(data) == get_recipe("spectrim")
    data["allocate"]["probe_windows"] = 4
    with pytest.raises(ValueError, match="probe_windows"):
        Recipe.model_validate(data)
