"""Recipes on mixtures of experts: what is pooled is said, and equal ranks are equal."""

import copy
import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM

from architectures import mixture, windows
from quick_recipes import quick
from spectrim import api
from spectrim.errors import ModelError
from spectrim.evaluate.agreement import agreement
from spectrim.recipes import PRESETS
from spectrim.recipes.presets import get_recipe
from spectrim.run.compress import run_recipe
from spectrim.run.loading import LoadedModel
from spectrim.run.options import RunOptions
from spectrim.run.store.saving import save_outcome
from spectrim.storage.tensor_file import TensorFile


def compressed(recipe, kind="mixtral", *, keep=0.6, text=None, **changes):
    chosen = get_recipe(recipe).with_changes(keep=keep, **changes)
    loaded = LoadedModel(mixture(kind), None, "tiny", torch.float32)
    return run_recipe(
        loaded, chosen, RunOptions(measure=False), text=windows(4, 16) if text is None else text
    )


@pytest.mark.parametrize("recipe", ["svd-llm", "spectrim"])
def test_a_small_cut_of_a_mixture_changes_little(recipe):
    """At the largest keep below one the compressed mixture is nearly the original."""
    ids = windows(2)
    with torch.no_grad():
        dense = mixture("mixtral")(ids, use_cache=False).logits
        found = compressed(recipe, keep=0.97).model(ids, use_cache=False).logits
    assert (found - dense).norm() < 0.5 * dense.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_cuts_the_experts_and_its_result_reads_back(name, tmp_path):
    if any(step.step == "lora" for step in PRESETS[name].refine):
        pytest.importorskip("peft")
    outcome = compressed(quick(PRESETS[name], 0.6), text=windows(16))
    assert outcome.plan.achieved_keep <= 0.6
    cut = [e for e in outcome.plan.entries if ".experts." in e.name and e.rank is not None]
    assert len(cut) > 15  # of 30: two blocks of five experts with three matrices
    save_outcome(dataclasses.replace(outcome, elastic=None), tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        expected = outcome.model(windows(2), use_cache=False).logits
        found = small(windows(2), use_cache=False).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_experts_without_tokens_are_named_and_cut_by_the_moments_of_the_others():
    # One token repeated: its two experts see everything, the others nothing.
    outcome = compressed("svd-llm", text=torch.full((4, 16), 3))
    targets = {said["name"]: said for said in outcome.report["targets"]}
    unseen = [name for name, said in targets.items() if said.get("expert_tokens") == 0]
    assert unseen
    note = next(n for n in outcome.report["notes"] if "no calibration token" in n)
    assert unseen[0] in note
    assert all(targets[name]["pooled_share"] == 1 for name in unseen)
    with torch.no_grad():
        assert outcome.model(windows(2), use_cache=False).logits.isfinite().all()


def test_equal_ranks_are_equal_within_a_block():
    outcome = compressed("svd-llm", allocate={"experts": "equal"})
    ranks = {}
    for entry in outcome.plan.entries:
        if ".experts." in entry.name:
            matrix = tuple(p for p in entry.name.split(".") if not p.isdigit())
            ranks.setdefault((entry.name.split(".")[2], matrix), set()).add(entry.rank)
    assert all(len(found) == 1 for found in ranks.values())


def test_a_family_that_is_mostly_not_understood_is_refused_by_name(monkeypatch):
    monkeypatch.setattr("spectrim.run.experts.find_experts", lambda *_: ({}, {}))
    with pytest.raises(ModelError, match=r"MixtralForCausalLM can be compressed.*3-D parameter"):
        compressed("svd")
    outcome = compressed("svd", targets={"partly": True})
    assert any("of the weights in the blocks" in note for note in outcome.report["notes"])


# Experts that are one tensor each on disk, and parameters as they are in memory.
@pytest.mark.parametrize(("kind", "recipe"), [("mixtral", "svd-llm"), ("gpt_oss", "spectrim")])
def test_blocks_read_one_at_a_time_give_the_bytes_of_a_model_in_memory(kind, recipe, tmp_path):
    mixture(kind).save_pretrained(tmp_path / "m", max_shard_size="40KB")
    for name, lazily in (("a", False), ("b", True)):
        api.compress(
            tmp_path / "m",
            recipe=get_recipe(recipe).with_changes(calibration={"batch": 4}),
            keep=0.6,
            text=windows(4, 16),
            output=tmp_path / name,
            out_of_core=lazily,
        )
    one, other = stored(tmp_path / "a"), stored(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def stored(folder):
    """Every tensor of a folder by its name."""
    files = [TensorFile(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: file.read(name) for file in files for name in file.entries}


def test_a_report_says_how_often_routers_choose_as_before():
    chosen = get_recipe("svd-llm").with_changes(keep=0.6)
    loaded = LoadedModel(mixture("mixtral"), None, "tiny", torch.float32)
    before = copy.deepcopy(loaded.model)
    outcome = run_recipe(loaded, chosen, RunOptions(measure=True), text=windows(4, 16))
    said = outcome.report["measured"]["texts"][0]
    found = agreement(before, outcome.model, windows(4, 16))
    assert len(found.routing) == 2
    assert said["routing"] == pytest.approx(sum(found.routing) / 2)
    assert 0 < said["routing"] < 1
    same = agreement(before, before, windows(4, 16))
    assert same.routing == (1.0, 1.0)


def test_a_survey_leaves_a_mixture_as_it_is_and_gives_every_size(tmp_path):
    model = mixture("mixtral")
    model.save_pretrained(tmp_path / "m")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    made = api.survey(model, recipe="svd-llm", text=windows(4, 16), scores=["first_order"])
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    surveyed = tmp_path / "survey"
    options = {"recipe": "svd-llm", "text": windows(4, 16), "scores": ["first_order"]}
    api.survey(tmp_path / "m", output=surveyed, **options)
    api.elastic(surveyed, tmp_path / "elastic", score="energy")
    for keep in (0.8, 0.5):
        plan = api.plan(made, keep=keep, rule="knapsack", score="energy")
        assert keep - 0.05 < plan.achieved_keep <= keep
        for source, score in ((surveyed, "energy"), (tmp_path / "elastic", None)):
            sized = api.resize(source, keep=keep, score=score)
            assert sized.plan.achieved_keep <= keep
            with torch.no_grad():
                assert sized.model(windows(2), use_cache=False).logits.isfinite().all()
