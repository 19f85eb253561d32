"""Model objects that could not be saved and loaded as they are are refused before any work."""

import pytest
import torch
from torch import nn

from architectures import family, tiny, windows
from spectrim import api
from spectrim.errors import ModelError
from spectrim.layers.swap import compressed_layers
from spectrim.run import rehearsing


def refused(model, match, **options):
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ModelError, match=match) as caught:
        api.compress(model, keep=0.5, recipe="svd", **options)
    assert "\n" not in str(caught.value)
    assert not compressed_layers(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_adapters_are_to_be_merged_first():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    adapted = peft.get_peft_model(tiny("llama")[0], settings)
    refused(adapted, r"PeftModel.* holds adapters of PEFT.*merge_and_unload")
    refused(adapted.base_model.model, r"LlamaForCausalLM holds adapters of PEFT.*q_proj")
    merged = adapted.merge_and_unload()
    assert api.compress(merged, keep=0.5, recipe="svd").plan.achieved_keep <= 0.5


def test_a_wrapper_is_told_from_the_model_inside_it():
    refused(nn.DataParallel(tiny("llama")[0]), r"DataParallel is a wrapper.*\(\.module\)")

    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.language = tiny("llama")[0]

        def forward(self, **kwargs):
            return self.language(**kwargs)

    refused(Mine(), r"Mine is a wrapper around a LlamaForCausalLM.*\(\.language\)")


def test_one_module_in_two_blocks_is_refused_by_both_names():
    model = tiny("llama")[0]
    model.model.layers[1].mlp = model.model.layers[0].mlp
    refused(model, r"'model\.layers\.0\.mlp\..*' and 'model\.layers\.1\.mlp\..*' .*one tensor")
    model = tiny("llama")[0]
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    refused(model, r"layers\.0\.mlp\.up_proj\.weight' and .*layers\.1.*one tensor")


def test_a_model_that_is_not_what_its_configuration_makes_is_refused():
    model = tiny("llama")[0]
    model.model.layers[1].extra = nn.Linear(40, 4)
    refused(model, r"changed after it was made.*has a tensor 'model\.layers\.1\.extra")
    model = tiny("llama")[0]
    model.model.layers[1].mlp.up_proj = nn.Linear(40, 54, bias=True)
    refused(model, r"has a tensor 'model\.layers\.1\.mlp\.up_proj\.bias'")
    model = tiny("llama")[0]
    del model.model.layers[1]
    refused(model, r"lacks the tensor 'model\.layers\.1\.")
    assert api.compress(tiny("qwen3")[0], keep=0.5, recipe="svd").plan.entries  # tied as it says


def test_what_could_not_be_loaded_is_found_out_before_the_first_decomposition(monkeypatch):
    def only_plain(module, name):
        raise ModelError(f"{name} is a {type(module).__name__}")

    # As it was for a class of linear layers that could be cut, and not be put back.
    monkeypatch.setattr("spectrim.storage.quantizer.dense_shape", only_plain)
    refused(tiny("llama")[0], r"could not be loaded again \(.*nothing was computed")


def test_a_rehearsal_leaves_no_trace(monkeypatch):
    model = tiny("gemma3")[0]
    config, state = model.config.to_dict(), model.state_dict()
    from spectrim.model.tracing import trace

    rehearsing.rehearse(model, trace(model, windows(1)))
    assert model.config.to_dict() == config and getattr(model, "hf_quantizer", None) is None
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("kind", ["falcon", "bloom", "mpt"])
def test_arguments_that_depend_on_the_batch_are_those_of_the_batch(kind):
    sizes = {"num_kv_heads": 2, "alibi": True} if kind == "falcon" else {"n_head": 4}
    ids = windows(6, 12)
    runs = []
    for batch in (1, 4):
        recipe = api.resolve_recipe("svd-llm").with_changes(calibration={"batch": batch})
        model = family(kind, **sizes)
        api.compress(model, keep=0.5, recipe=recipe, text=ids)
        with torch.no_grad():
            runs.append(model(ids).logits)
    assert torch.allclose(*runs, atol=1e-3 * runs[0].abs().max())
