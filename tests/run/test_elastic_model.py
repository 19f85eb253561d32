"""Elastic models: instant, reversible, and the same as what is saved."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from architectures import tiny, windows
from gated_cases import gated_model
from quick_recipes import FEW_STEPS
from spectrim import api
from spectrim.allocate.elastic import elastic_order
from spectrim.errors import ArtifactError, BudgetError, RecipeError
from spectrim.layers.swap import compressed_layers
from spectrim.recipes import get_recipe
from spectrim.run.learned.elastic import ElasticModel, open_elastic
from spectrim.run.loading import load_model
from spectrim.storage.elastic import Base, Elastic

ACIP = {"learn": FEW_STEPS, "keep": 0.6}
SOCO = {
    "learn": {
        "learning_rate": 0.1,
        "warmup_steps": 2,
        "explore_steps": 8,
        "oscillate_steps": 4,
        "sparsify_steps": 4,
        "recover_steps": 3,
        "pressure_growth": 1.3,
        "dead_after": 2,
        "batch": 4,
    },
    "keep": 0.5,
}


def logits(model):
    with torch.no_grad():
        return model(windows(2), use_cache=False).logits


def folder_of(name, path):
    tiny(name)[0].save_pretrained(path)
    return path


def in_memory(name, path):
    """An artifact of an untrained model: SVD components ordered by energy."""
    loaded = load_model(folder_of(name, path))
    _, gated = gated_model(name)
    importance = [(layer.down.square().sum(1),) for layer in gated.layers.values()]
    order, kept = elastic_order(gated.curves, importance, limits=gated.limits)
    factors = {
        name: (layer.up[:, index], layer.down[index])
        for (name, layer), index in zip(gated.layers.items(), kept, strict=True)
    }
    base = Base(name=str(path), identity=loaded.identity(), dtype="float32", other_bytes=5000)
    return loaded, Elastic(order, factors, base, "test")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_resizing_is_reversible_and_copies_nothing(name, tmp_path):
    loaded, elastic = in_memory(name, tmp_path / "m")
    opened = ElasticModel(loaded, elastic)
    dense = logits(opened.model)
    seen = {}
    for keep in (0.5, 0.8, 1.0, 0.8, 0.5):
        plan = opened.resize(keep)
        assert plan.achieved_keep <= keep
        ranks = {n: layer.rank for n, layer in compressed_layers(opened.model).items()}
        assert ranks == {e.name: e.rank for e in plan.entries if e.rank is not None}
        found = logits(opened.model)
        assert torch.equal(seen.setdefault(keep, found), found)
    assert torch.equal(seen[1.0], dense)
    assert not torch.equal(seen[0.5], dense)
    for layer in compressed_layers(opened.model).values():
        stored = layer.down.weight.untyped_storage()
        assert any(
            stored.data_ptr() == down.untyped_storage().data_ptr()
            for _, down in opened._factors.values()
        )


def test_a_size_below_the_end_is_refused_and_changes_nothing(tmp_path):
    opened = ElasticModel(*in_memory("llama", tmp_path / "m"))
    opened.resize(0.7)
    before = logits(opened.model)
    with pytest.raises(BudgetError, match=f"{opened.sizes.smallest_keep:.6f}"):
        opened.resize(opened.sizes.smallest_keep / 2)
    with pytest.raises(BudgetError, match="either"):
        opened.resize()
    assert torch.equal(logits(opened.model), before)
    plan = opened.resize(size=opened.sizes.largest_bytes - 20_000)
    stored = sum(e.bytes for e in plan.entries) + elastic_other(opened)
    assert stored <= opened.sizes.largest_bytes - 20_000


def elastic_other(opened):
    return opened.elastic.base.other_bytes


def test_another_base_model_is_refused(tmp_path):
    _, elastic = in_memory("llama", tmp_path / "m")
    other = tiny("llama")[0]
    with torch.no_grad():
        other.lm_head.weight += 1
    with pytest.raises(ArtifactError, match="not the one"):
        open_elastic(elastic, base=other)


def test_a_training_becomes_an_artifact_of_every_size(tmp_path):
    model, text = folder_of("llama", tmp_path / "m"), windows(8)
    recipe = get_recipe("acip").with_changes(**ACIP)
    result = api.compress(
        model, recipe=recipe, text=text, output=tmp_path / "e", self_contained=True
    )
    opened = api.load_elastic(tmp_path / "e")
    opened.resize(0.6)
    assert torch.equal(logits(opened.model), logits(result.model))
    assert not [n for n, _ in opened.model.named_modules() if "lora" in n or "gate_" in n[-5:]]
    small = api.resize(tmp_path / "e", keep=0.7, output=tmp_path / "o")
    assert small.plan.achieved_keep <= 0.7
    outside = small.report["outside_budget"]
    assert outside == result.report["outside_budget"] and "norms" in outside["words"]
    assert small.report["stored"]["achieved_keep"] == pytest.approx(small.plan.achieved_keep)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert torch.equal(logits(plain), logits(small.model))
    with pytest.raises(BudgetError, match="smallest reachable"):
        api.resize(tmp_path / "e", keep=0.01)


def test_a_keep_below_the_stop_is_refused_before_training():
    recipe = get_recipe("acip").with_changes(**ACIP | {"keep": 0.3})
    with pytest.raises(BudgetError, match=r"stop_keep 0\.5"):
        api.compress(tiny("llama")[0], recipe=recipe, text=windows(8))


def test_a_training_that_ends_early_gives_the_sizes_it_reached():
    recipe = get_recipe("acip").with_changes(learn=ACIP["learn"] | {"max_steps": 4}, keep=0.5)
    result = api.compress(tiny("llama")[0], recipe=recipe, text=windows(8))
    smallest = result.elastic.order.smallest_keep
    assert 0.5 < smallest <= 1
    assert result.plan.achieved_keep <= smallest
    assert any(f"ended after 4 steps at keep {smallest:.4f}" in n for n in result.report["notes"])


@pytest.mark.parametrize("recipe", ["acip", "soco"])
def test_recomputed_activations_train_the_same_model(recipe):
    changes = {"acip": ACIP, "soco": SOCO}[recipe]
    found = []
    for recompute in ("always", "never"):
        learn = changes["learn"] | {"recompute": recompute}
        chosen = get_recipe(recipe).with_changes(keep=changes["keep"], learn=learn)
        result = api.compress(tiny("qwen2")[0], recipe=chosen, text=windows(8))
        found.append(logits(result.model))
    assert torch.equal(*found)


def test_the_fisher_order_needs_no_training_of_gates():
    learn = ACIP["learn"] | {"order": "fisher", "order_steps": 3}
    recipe = get_recipe("acip").with_changes(keep=0.6, learn=learn)
    result = api.compress(tiny("llama")[0], recipe=recipe, text=windows(8))
    assert result.report["network"]["acip"]["steps"] == 0
    assert 0.4 < result.elastic.order.smallest_keep <= 0.5
    assert 0.5 < result.plan.achieved_keep <= 0.6


def test_soco_leaves_an_ordinary_compressed_model(tmp_path):
    recipe = get_recipe("soco").with_changes(**SOCO)
    result = api.compress(tiny("qwen2")[0], recipe=recipe, text=windows(8), output=tmp_path / "o")
    assert result.plan.achieved_keep <= 0.5
    assert result.report["stored"]["achieved_keep"] == pytest.approx(result.plan.achieved_keep)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "o")
    assert torch.equal(logits(plain), logits(result.model))


def test_a_basis_that_would_shift_is_refused():
    recipe = get_recipe("soco").with_changes(**SOCO | {"decompose": {"objective": "anchored"}})
    with pytest.raises(RecipeError, match="whitened or plain"):
        api.compress(tiny("llama")[0], recipe=recipe, text=windows(8))


def test_a_resumed_run_with_another_recipe_names_the_difference(tmp_path):
    recipe = get_recipe("soco").with_changes(
        **SOCO | {"learn": SOCO["learn"] | {"checkpoint_every": 5}}
    )
    api.compress(tiny("llama")[0], recipe=recipe, text=windows(8), work=tmp_path)
    cheaper = recipe.with_changes(learn={"recompute": "always"})
    api.compress(tiny("llama")[0], recipe=cheaper, text=windows(8), work=tmp_path)
    other = recipe.with_changes(learn={"batch": 2})
    with pytest.raises(Exception, match=r"learn\.batch: 4 there, 2 now"):
        api.compress(tiny("llama")[0], recipe=other, text=windows(8), work=tmp_path)


def test_a_survey_gives_every_size_by_its_scores(tmp_path):
    model, text = folder_of("llama", tmp_path / "m"), windows(8)
    surveyed = api.survey(
        model, output=tmp_path / "s", recipe="zs-svd", text=text, scores=("first_order", "kfac")
    )
    ranks = {}
    for score in ("energy", "first_order", "kfac"):
        opened = api.load_elastic(tmp_path / "s", score=score)
        plan = opened.resize(0.6)
        ranks[score] = [e.rank for e in plan.entries]
        for name, layer in compressed_layers(opened.model).items():
            up, down = surveyed.factors[name].cut(layer.rank)
            assert torch.allclose(layer.dense_weight(), up @ down, atol=1e-6)
    assert ranks["energy"] != ranks["kfac"]
    elastic = api.elastic(tmp_path / "s", tmp_path / "e", score="kfac")
    again = api.load_elastic(tmp_path / "e")
    assert [e.rank for e in again.resize(0.6).entries] == ranks["kfac"]
    assert elastic.source == again.elastic.source == "kfac"
    small = api.resize(tmp_path / "e", keep=0.6)
    assert small.plan.achieved_keep <= 0.6
