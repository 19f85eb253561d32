"""A compressed mixture of experts goes to disk and back; its dense export is a checkpoint again."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from architectures import MIXTURES, mixture, windows
from spectrim.errors import ArtifactError
from spectrim.recipes.presets import get_recipe
from spectrim.run.compress import run_recipe
from spectrim.run.loading import LoadedModel
from spectrim.run.options import RunOptions
from spectrim.run.store.saving import save_outcome
from spectrim.storage.dense import export_dense

CLOSE = 1e-4  # of the largest logit: fp32 products in another order


def stored(folder):
    """Name -> shape of every tensor in a folder."""
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in list(file.keys())}
    return shapes


def logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def compressed(model, folder, recipe="svd"):
    chosen = get_recipe(recipe).with_changes(keep=0.6)
    outcome = run_recipe(
        LoadedModel(model, None, "tiny", torch.float32), chosen, RunOptions(measure=False)
    )
    save_outcome(outcome, folder)
    return outcome


# Names on disk put together, kept, renamed, renamed like a layer of ours, and without a gate.
@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_reads_back_generates_and_exports_in_the_layout_of_its_checkpoint(kind, tmp_path):
    mixture(kind).save_pretrained(tmp_path / "original")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "original")
    ids = windows(2)
    outcome = compressed(original, tmp_path / "small")
    assert 0.55 < outcome.plan.achieved_keep <= 0.6
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    found = logits(small, ids)
    assert (found - logits(outcome.model, ids)).abs().max() < CLOSE * found.abs().max()
    written = small.generate(ids[:1, :4], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert written.shape == (1, 7)
    export_dense(tmp_path / "small", tmp_path / "dense")
    assert stored(tmp_path / "dense") == stored(tmp_path / "original")
    dense = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), ids)
    assert (dense - found).abs().max() < CLOSE * found.abs().max()


def test_a_second_save_writes_the_same_names(tmp_path):
    compressed(mixture("phimoe"), tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    again.save_pretrained(tmp_path / "twice")
    assert stored(tmp_path / "twice") == stored(tmp_path / "once")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"experts": 4}, "expected a parameter of shape"), ({"parts": "mixed"}, "parts")],
)
def test_a_table_of_experts_that_does_not_fit_is_refused(change, words, tmp_path):
    compressed(mixture("mixtral"), tmp_path / "small")
    path = tmp_path / "small" / "config.json"
    config = json.loads(path.read_text())
    for entry in config["quantization_config"]["experts"].values():
        entry |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_a_lost_layer_of_an_expert_is_not_made_up(tmp_path):
    from safetensors.torch import load_file, save_file

    compressed(mixture("mixtral"), tmp_path / "small")
    path = tmp_path / "small" / "model.safetensors"
    tensors = load_file(path)
    lost = next(name for name in tensors if "experts.down_proj.3" in name)
    save_file({k: v for k, v in tensors.items() if k != lost}, path, {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"down_proj\.3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")
