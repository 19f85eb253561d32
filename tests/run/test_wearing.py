"""A LoRA folder on the model it is for, and refused by every other."""

import copy

import pytest
import torch

from architectures import tiny, windows
from jobs import logits
from spectrim import api
from spectrim.errors import ModelError
from spectrim.run.loading import load_model
from spectrim.run.wearing import wearing
from storage_cases import compressed, save

pytest.importorskip("peft")
IDS = windows(6, 12)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense model, one that was compressed from it, and the adapter between them."""
    folder = tmp_path_factory.mktemp("wearing")
    dense = tiny("llama")[0].eval()
    save(compressed(model=copy.deepcopy(dense)), folder / "base")
    dense.save_pretrained(folder / "dense")
    api.adapter(folder / "base", folder / "dense", rank=20, text=IDS, output=folder / "adapter")
    return folder


def test_a_base_with_its_adapter_is_measured_as_one_model(place):
    """Nearer to the dense model than the base, with the bytes of both."""
    words = {"text": IDS, "against": place / "dense"}
    bare = api.evaluate(place / "base", **words)
    worn = api.evaluate(place / "base", adapter=place / "adapter", **words)
    apart = [next(iter(r["agreement"].values()))["kl"] for r in (bare, worn)]
    assert apart[1] < 0.5 * apart[0]
    stored = sum(f.stat().st_size for f in (place / "adapter").glob("*.safetensors"))
    assert worn["stored_bytes"] == bare["stored_bytes"] + stored
    assert worn["model"].endswith("base + " + str(place / "adapter"))


def test_the_worn_adapter_computes_what_the_record_promises(place):
    """Base plus factors, multiplied out by hand."""
    from safetensors.torch import load_file

    worn = wearing(load_model(place / "base"), place / "adapter")
    tensors = load_file(place / "adapter" / "adapter_model.safetensors")
    name = next(k for k in tensors if k.endswith("lora_A.weight"))
    layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    module, base = worn.model.get_submodule(layer), load_model(place / "base").model
    x = torch.randn(3, tensors[name].shape[1])
    update = tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    expected = base.get_submodule(layer)(x) + x @ update.T
    torch.testing.assert_close(module(x), expected)


def test_an_adapter_for_another_base_is_refused_by_name(place, tmp_path):
    with pytest.raises(ModelError, match=r"made for .*base.* not those of .*dense"):
        wearing(load_model(place / "dense"), place / "adapter")
    # Made elsewhere, without our record: what it adapts must be there and fit.
    (place / "adapter" / "spectrim_adapter.json").rename(tmp_path / "record")
    others = {
        "no such layer": tiny("gpt2")[0],
        r"for a layer \(40, 60\)": tiny("llama", intermediate_size=60)[0],
    }
    try:
        for words, model in others.items():
            before = logits(model.eval(), IDS)
            with pytest.raises(ModelError, match=words):
                wearing(load_model(model), place / "adapter")
            assert torch.equal(logits(model, IDS), before)
    finally:
        (tmp_path / "record").rename(place / "adapter" / "spectrim_adapter.json")


def test_what_is_no_lora_folder_is_refused(place):
    with pytest.raises(ModelError, match=r"no LoRA folder: it has no adapter_config\.json"):
        api.evaluate(place / "base", text=IDS, adapter=place / "dense")
