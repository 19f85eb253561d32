"""Training a saved result: held-out windows decide, bytes stay, the report goes on."""

import json

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from architectures import tiny, windows
from jobs import logits
from spectrim import api
from spectrim.errors import ArtifactError, InputError, ModelError
from spectrim.evaluate.agreement import agreement
from spectrim.layers.swap import compressed_layers
from spectrim.storage.inspect import inspect_folder
from storage_cases import compressed, save

# A text of a dozen words: what there is to learn shows on windows that were not seen.
IDS = windows(32, 16, vocab_size=12)
FAST = {"steps": 12, "batch": 8}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A model without data in factored storage, whose first layers stay as they are."""
    folder = tmp_path_factory.mktemp("healed")
    model = tiny("llama", num_hidden_layers=3)[0]
    model.save_pretrained(folder / "dense")
    api.compress(model, recipe="svd", keep=0.6, skip="*.layers.0.*", output=folder / "out")
    return folder / "out"


def nll(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    predicted = logits(model, ids)[:, :-1].double().flatten(0, 1)
    return float(F.cross_entropy(predicted, ids[:, 1:].flatten()))


@pytest.mark.parametrize("parts", ["factors", "lora"])
def test_healing_lowers_the_loss_on_fresh_text_and_continues_the_report(parts, result, tmp_path):
    if parts == "lora":
        pytest.importorskip("peft")
    rate = {"learning_rate": 5e-3 if parts == "lora" else 0.02}
    healed = api.heal(result, text=IDS, parts=parts, output=tmp_path / "new", **FAST, **rate)
    entry = healed.report["healing"][-1]
    assert entry["after"] < entry["before"]
    fresh = windows(8, 16, seed=5, vocab_size=12)
    assert nll(tmp_path / "new", fresh) < nll(result, fresh)
    old, new = inspect_folder(result), inspect_folder(tmp_path / "new")
    assert new.bytes == old.bytes and new.table == old.table
    report = json.loads((tmp_path / "new" / "spectrim_report.json").read_text())
    before = json.loads((result / "spectrim_report.json").read_text())
    assert report["targets"] == before["targets"] and len(report["healing"]) == 1
    assert report["measured"]["texts"] == []
    assert "healed" in (tmp_path / "new" / "README.md").read_text()
    before, after = (AutoModelForCausalLM.from_pretrained(f) for f in (result, tmp_path / "new"))
    inside = tuple(f"{name}." for name in compressed_layers(after))
    moved = {
        name
        for (name, p), q in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved and all(name.startswith(inside) for name in moved)


def test_a_text_that_is_learned_by_heart_is_not_called_held_out(result):
    apart = api.heal(result, text=windows(8, 16), **FAST)
    assert apart.report["healing"][-1]["notes"] == []
    twice = windows(4, 16).repeat(4, 1)
    (said,) = api.heal(result, text=twice, **FAST).report["healing"][-1]["notes"]
    assert said.startswith("100% of the held-out text stands in the windows that were trained on")


def test_a_teacher_draws_the_distribution_to_its_own(result):
    teacher = AutoModelForCausalLM.from_pretrained(result.parent / "dense").eval()
    before = AutoModelForCausalLM.from_pretrained(result).eval()
    ids = windows(32, 16)
    healed = api.heal(result, text=ids, teacher=result.parent / "dense", learning_rate=0.02, **FAST)
    fresh = windows(6, 16, seed=7)
    far, near = (agreement(teacher, m, fresh).kl for m in (before, healed.model))
    assert near < far


def test_a_training_that_does_not_help_is_not_kept(result):
    """Held-out windows of other words: what is learned from the rest makes them less likely."""
    ids = IDS.clone()
    ids[(torch.arange(4) * 32) // 4] = 12 + windows(4, 16, seed=1, vocab_size=55)
    healed = api.heal(result, text=ids, steps=200, learning_rate=0.05)
    (fit,) = healed.report["healing"][-1]["stages"]
    assert fit["step"] == 0 and fit["before"] == fit["after"]
    assert len(fit["history"]) == 1 + 3  # patience, not two hundred steps
    before = AutoModelForCausalLM.from_pretrained(result)
    for p, q in zip(before.parameters(), healed.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_packed_parts_train_as_well(tmp_path):
    api.compress(
        tiny("llama")[0], recipe="svd", keep=0.6, storage="packed", output=tmp_path / "out"
    )
    healed = api.heal(tmp_path / "out", text=IDS, learning_rate=0.02, **FAST)
    entry = healed.report["healing"][-1]
    assert entry["after"] < entry["before"]


def test_what_cannot_be_healed_is_refused_in_words(result, tmp_path):
    with pytest.raises(ModelError, match="nothing to heal"):
        api.heal(result.parent / "dense", text=IDS)
    api.compress(tiny("llama")[0], recipe="svd", weights="int8", output=tmp_path / "int8")
    with pytest.raises(ModelError, match=r"coded weights.*int8"):
        api.heal(tmp_path / "int8", text=IDS)
    save(compressed(), tmp_path / "bare")
    (tmp_path / "bare" / "spectrim_report.json").unlink()
    with pytest.raises(ArtifactError, match="spectrim_report"):
        api.heal(tmp_path / "bare", text=IDS)
    for given in ({"parts": "norms"}, {"rank": 3}, {"learning_rate": -1.0}, {"steps": 0}):
        with pytest.raises(InputError):
            api.heal(result, text=IDS, **given)
    other = tiny("llama", vocab_size=80)[0]
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="same vocabulary"):
        api.heal(result, text=IDS, teacher=tmp_path / "other")
