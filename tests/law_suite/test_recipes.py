"""Laws that hold for every recipe, present and future, on a tiny model with few windows.

A recipe is made quick by small numbers in its own fields; what it does stays the same. Each
preset is carried out once, saved and loaded; other sizes are carried out without saving. Two blocks
show what more do: a first one, and one after what another has left.
"""

import dataclasses
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from architectures import tiny, windows
from jobs import logits, same_state
from quick_recipes import quick
from spectrim.data.self_text import sample_windows
from spectrim.layers.swap import compressed_layers
from spectrim.recipe import Recipe
from spectrim.recipes import PRESETS
from spectrim.run.compress import Outcome, run_recipe
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions
from spectrim.run.store.saving import save_outcome

ARCHITECTURE = "qwen2"  # a llama whose queries, keys and values have biases
KEEP = 0.6
LARGER_KEEP = 0.95

TRAINS_BIASES = {"block", "distill"}


def original():
    return tiny(ARCHITECTURE)[0]


@cache
def text():
    """What the recipes call `self`, sampled once for all of them."""
    return sample_windows(original(), windows=16, window_length=12, seed=0).ids


def carry_out(recipe: Recipe) -> Outcome:
    if any(step.step == "lora" for step in recipe.refine):
        pytest.importorskip("peft")
    outcome = run_recipe(load_model(original()), recipe, RunOptions(measure=False), text=text())
    # The artifact of every size has laws of its own; here it is one model of the asked size.
    return dataclasses.replace(outcome, elastic=None)


@dataclass
class Saved:
    outcome: Outcome
    folder: Path


@pytest.fixture(scope="module", params=list(PRESETS))
def saved(request, tmp_path_factory):
    """A preset's result at one size, in memory and as a folder."""
    outcome = carry_out(quick(PRESETS[request.param], KEEP))
    folder = tmp_path_factory.mktemp(request.param) / "result"
    save_outcome(outcome, folder)
    return Saved(outcome, folder)


def target_bytes_on_disk(folder, names):
    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (a handle, not a mapping)
                if any(key.startswith(f"{name}.") for name in names):
                    tensor = tensors.get_tensor(key)
                    total += tensor.numel() * tensor.element_size()
    return total


def test_keep_is_met_within_one_component_and_is_that_of_the_files(saved):
    plan, keep = saved.outcome.plan, saved.outcome.report["keep"]
    dense = sum(e.dense_bytes for e in plan.entries)
    shapes = {t["name"]: t["shape"] for t in saved.outcome.report["targets"]}
    component = max(4 * sum(shape) for shape in shapes.values())
    assert keep["asked"] == KEEP
    assert 0 <= KEEP - keep["achieved"] <= component / dense
    stored = target_bytes_on_disk(saved.folder, [e.name for e in plan.entries])
    assert stored == keep["target_bytes"]["stored"] == sum(e.bytes for e in plan.entries)
    assert dense == keep["target_bytes"]["dense"]
    assert keep["achieved"] == stored / dense


def test_loading_gives_the_same_model(saved):
    loaded = AutoModelForCausalLM.from_pretrained(saved.folder).eval()
    ids = windows(3, 12, seed=9)
    assert compressed_layers(loaded)
    assert torch.equal(logits(loaded, ids), logits(saved.outcome.model, ids))


def test_the_stored_recipe_gives_the_same_bytes_again(saved):
    recipe = Recipe.from_file(saved.folder / "recipe.yaml")
    assert recipe == saved.outcome.recipe
    assert recipe.hash() == saved.outcome.report["recipe"]["hash"]
    again = carry_out(recipe)
    assert again.report["recipe"] == saved.outcome.report["recipe"]
    assert again.plan == saved.outcome.plan
    # Saving attaches a configuration, never values.
    assert same_state(again.model, saved.outcome.model)


def test_the_report_is_whole_and_finite(saved):
    for report in (
        saved.outcome.report,
        json.loads((saved.folder / "spectrim_report.json").read_text(encoding="utf-8")),
    ):
        json.dumps(report, allow_nan=False)
        assert report.keys() >= {
            "format_version", "model", "recipe", "keep", "rule", "predicted_loss", "targets",
            "blocks", "network", "left_alone", "calibration", "seconds", "peak_memory_bytes",
            "notes", "environment", "outside_budget",
        }  # fmt: skip
        assert {t["name"] for t in report["targets"]} == {
            e.name for e in saved.outcome.plan.entries
        }
        for target in report["targets"]:
            assert target["bytes"] <= target["dense_bytes"]
            if target["rank"] is not None and PRESETS[report["recipe"]["name"]].learn is None:
                assert 0 <= target["predicted_error"] <= 1
                assert target.get("measured_error", 0.0) >= 0
        assert sum(report["seconds"].values()) > 0


def test_what_is_no_target_stays(saved):
    """Embeddings, final norm and head always; norms and biases unless the recipe trains them."""
    recipe = saved.outcome.recipe
    trained = recipe.learn is not None or any(s.step in TRAINS_BIASES for s in recipe.refine)
    before, after = original().state_dict(), saved.outcome.model.state_dict()
    weights = {f"{e.name}.weight" for e in saved.outcome.plan.entries}
    for name, value in before.items():
        if name in weights or (trained and ".layers." in name):
            continue
        where = name
        if name.endswith(".bias") and name not in after:
            target = name.removesuffix(".bias")
            where = next(n for n in after if n.startswith(f"{target}.") and n.endswith("bias"))
        assert torch.equal(after[where], value), name


@pytest.mark.parametrize("name", PRESETS)
def test_keep_one_is_the_original(name):
    outcome = carry_out(quick(PRESETS[name], 1.0))
    ids = windows(3, 12, seed=9)
    assert torch.equal(logits(outcome.model, ids), logits(original(), ids))
    assert outcome.report["keep"]["achieved"] == 1.0


def test_error_falls_with_keep(saved):
    """Down to none: at keep 1 the model is the original, which the law before this one says."""
    ids = text()
    larger = carry_out(quick(PRESETS[saved.outcome.recipe.name], LARGER_KEEP))
    expected = logits(original(), ids)
    small, large = (
        float((logits(outcome.model, ids) - expected).square().mean())
        for outcome in (saved.outcome, larger)
    )
    assert 0 < large < 0.9 * small
