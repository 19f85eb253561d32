"""The difference of two models as an adapter: exact where it can be, best where it cannot."""

import copy
import json

import pytest
import torch

from architectures import tiny, windows
from jobs import logits
from spectrim import api
from spectrim.errors import InputError, ModelError
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module, is_linear, read_weight, write_weight
from spectrim.storage.adapter import RECORD_FILE
from storage_cases import compressed, linear_names, save

IDS = windows(6, 12)


def tuned(base, names, *, rank=None, seed=0):
    """A copy whose linear layers of these names differ, by rank r or fully."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    for name in linear_names(model):
        if name.split(".")[-1] in names:
            module = get_module(model, name)
            m, n = read_weight(module).shape
            r = rank or min(m, n)
            update = torch.randn(m, r, generator=generator) @ torch.randn(r, n, generator=generator)
            write_weight(module, read_weight(module) + 0.02 * update)
    return model


def folder(model, path):
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("name, targets", [("llama", ["q_proj", "up_proj"]), ("gpt2", ["c_attn"])])
@pytest.mark.parametrize("text", [None, IDS], ids=["plain", "kfac"])
def test_a_difference_of_the_rank_is_extracted_whole(name, targets, text, tmp_path):
    peft = pytest.importorskip("peft")
    base = tiny(name)[0].eval()
    model = tuned(base, targets, rank=2)
    expected, twin = logits(model, IDS), copy.deepcopy(base)
    made = api.adapter(base, model, rank=2, text=text, output=tmp_path / "adapter")
    assert made.facts["left"] < 1e-6 * made.facts["difference"]
    loaded = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, IDS), expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2


def test_what_is_left_is_the_optimum_of_the_metric():
    """Against `min ‖(Δ − Δ_r) X‖` from the singular values of `Δ C^½`."""
    base = tiny("llama")[0].eval()
    model = tuned(base, ["o_proj"])
    twin = copy.deepcopy(model)
    made = api.adapter(copy.deepcopy(base), model, rank=3, text=IDS, metric="whitened")
    inputs = {}
    name = next(n for n in linear_names(twin) if n.endswith("o_proj"))

    def note(module, args):
        inputs[name] = args[0].double().flatten(0, 1)

    with get_module(twin, name).register_forward_pre_hook(note):
        logits(twin, IDS)
    X = inputs[name].T
    C = X @ X.T
    D = (read_weight(get_module(twin, name)) - read_weight(get_module(base, name))).double()
    prior = D.square().sum(0)
    # The default recipe's share of the prior, under which all columns are worth the same.
    weights = torch.where(prior > 0, 1 / prior, 0.0)
    C = 0.9 * C + 0.1 * torch.diag(weights) * (prior @ C.diagonal()) / (prior > 0).sum()
    values, Q = torch.linalg.eigh(C)
    s = torch.linalg.svdvals(D @ Q * values.clamp(min=0).sqrt())
    assert made.facts["targets"][name]["left"] == pytest.approx(
        float(s[3:].square().sum()), rel=1e-4
    )


def test_the_adapter_of_a_compressed_base_brings_it_nearer(tmp_path):
    peft = pytest.importorskip("peft")
    dense = tiny("llama")[0].eval()
    save(compressed(model=copy.deepcopy(dense)), tmp_path / "base")
    folder(dense, tmp_path / "dense")
    from transformers import AutoModelForCausalLM

    made = api.adapter(
        tmp_path / "base", tmp_path / "dense", rank=20, output=tmp_path / "adapter", dtype="float32"
    )
    assert 0 < made.facts["left"] < made.facts["difference"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    wanted = logits(dense, IDS)
    before = float((logits(base, IDS) - wanted).norm())
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert float((logits(loaded, IDS) - wanted).norm()) < 0.7 * before
    assert json.loads((tmp_path / "adapter" / RECORD_FILE).read_text())["objective"] == "plain"


def test_layers_that_read_together_have_adapters_of_one_rank_and_others_none():
    base = tiny("llama")[0].eval()
    made = api.adapter(base, tuned(base, ["q_proj", "up_proj"]), rank=4)
    found = {name.split(".")[-1] for name in made.factors}
    assert found == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert {(up.shape[1], down.shape[0]) for up, down in made.factors.values()} == {(4, 4)}
    untouched = {t.name for t in trace(base, IDS[:1]).targets} - set(made.factors)
    assert all(is_linear(get_module(base, name)) for name in untouched)


def test_what_no_adapter_holds_is_listed_and_refused_unless_allowed():
    base = tiny("llama")[0].eval()
    model = tuned(base, ["q_proj"], rank=2)
    model.model.norm.weight.data *= 1.5
    with pytest.raises(InputError, match=r"1 weights.*model\.norm\.weight \(0\.33"):
        api.adapter(copy.deepcopy(base), model, rank=2)
    made = api.adapter(copy.deepcopy(base), model, rank=2, allow_differences=True)
    assert list(made.facts["outside"]) == ["model.norm.weight"]


def test_a_model_stored_in_fewer_bits_differs_by_nothing():
    base = tiny("llama")[0].eval()
    model = copy.deepcopy(base).to(torch.bfloat16)
    update = tuned(model, ["q_proj"], rank=2)
    assert api.adapter(base, update, rank=2).facts["outside"] == {}


def test_what_cannot_be_an_adapter_is_refused_in_words(tmp_path):
    base = tiny("llama")[0].eval()
    model = tuned(base, ["q_proj"], rank=2)
    pairs = [
        (copy.deepcopy(base), "no linear layer"),
        (tiny("gpt2")[0], "one architecture"),
        (tiny("llama", intermediate_size=60)[0], "one architecture"),
    ]
    for other, words in pairs:
        with pytest.raises(ModelError, match=words):
            api.adapter(copy.deepcopy(base), other, rank=2, allow_differences=True)
    with pytest.raises(InputError, match="no more than"):
        api.adapter(base, model, rank=21)
    for given in ({"rank": 0}, {"metric": "nearest"}, {"metric": "kfac"}, {"windows": 3}):
        with pytest.raises(InputError):
            api.adapter(base, model, **given)
    with pytest.raises(InputError, match="reads no text"):
        api.adapter(base, model, metric="plain", text=IDS)
