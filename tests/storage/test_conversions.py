"""Whatever transformers renames, splits or merges on the way to disk is saved and loaded."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from architectures import VOCAB, family, tiny, windows
from spectrim import api
from spectrim.layers.swap import compressed_layers
from spectrim.storage.conversions import Conversions
from spectrim.storage.inspect import inspect_folder
from spectrim.storage.shards import Shards
from storage_cases import compressed

MLA = {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
MLA |= {"v_head_dim": 10, "num_key_value_heads": 4, "head_dim": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 20}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 10}
LINEAR |= {"linear_value_head_dim": 10}
TEXT = {"vocab_size": VOCAB, "hidden_size": 40, "intermediate_size": 54, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 10, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}

FAMILIES = {
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "qwen3_5_text": MIXED | LINEAR,
    "qwen3_moe": MOE | {"num_experts": 4},
    "qwen3_next": MOE | MIXED | LINEAR | {"num_experts": 4, "shared_expert_intermediate_size": 20},
    "mixtral": {"num_local_experts": 4, "intermediate_size": 28},
    "deepseek_v3": MOE | MLA | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1},
    "granitemoe": {"num_local_experts": 4, "intermediate_size": 28},
    "gpt_neox": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_result_is_inspected_and_loaded_and_the_same_out_of_core(kind, tmp_path):
    family(kind, **FAMILIES[kind]).save_pretrained(tmp_path / "m")
    for name, lazily in (("in", False), ("out", True)):
        made = api.compress(
            tmp_path / "m", keep=0.5, recipe="svd", output=tmp_path / name, out_of_core=lazily
        )
        assert len(inspect_folder(tmp_path / name).targets) == len(made.plan.entries)
    inside, outside = (Shards(tmp_path / name) for name in ("in", "out"))
    assert set(inside.names) == set(outside.names)
    assert all(torch.equal(inside.read(n), outside.read(n)) for n in inside.names)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    cut = {e.name for e in made.plan.entries if e.rank is not None}
    assert compressed_layers(again).keys() == cut
    # transformers up to 5.20 does not say of which model it asks.
    told, untold = (again.hf_quantizer.update_weight_conversions([], *m) for m in ((again,), ()))
    assert [str(step) for step in told] == [str(step) for step in untold]
    state = again.state_dict()
    again.save_pretrained(tmp_path / "again")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert twice.keys() == state.keys()
    assert all(torch.equal(twice[n], state[n]) for n in state)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_5_text", "gpt_neox"])
def test_conversions_give_the_state_that_transformers_loads(kind, tmp_path):
    family(kind, **FAMILIES[kind]).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    shards = Shards(tmp_path)
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(family(kind, **FAMILIES[kind]).config)
    conversions = Conversions(bare, shards.names)
    assert conversions.unused == []
    whole = conversions.read(shards.read)
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[n], expected[n]) for n in whole)
    outline = conversions.read(shards.outline)
    assert {n: t.shape for n, t in outline.items()} == {n: t.shape for n, t in whole.items()}
    first = next(n for n in whole if ".0." in n).partition(".0.")[0] + ".0."
    inside = conversions.read(shards.read, within=first)
    outside = conversions.read(shards.read, outside=(first,))
    assert inside.keys() | outside.keys() == whole.keys() and not inside.keys() & outside.keys()


def test_a_projection_that_is_stored_in_one_piece_with_others_may_be_cut_alone(tmp_path):
    """`hrm_text` stores gate, query, key and value in one tensor, which factors have no part of."""
    model = family("hrm_text", num_key_value_heads=4)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    model = compressed(model=model, kinds=("factored",), rank=3)
    assert 0 < len(compressed_layers(model)) < len(names)
    model.save_pretrained(tmp_path / "once")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    expected, found = model.state_dict(), again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in found)


HEADS = ("SequenceClassification", "TokenClassification")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_another_head_is_new_and_everything_else_is_there(kind, head, tmp_path):
    import transformers

    from spectrim.errors import ArtifactError

    model = compressed(kind)
    model.save_pretrained(tmp_path)
    other = getattr(transformers, f"AutoModelFor{head}")
    again = other.from_pretrained(tmp_path, num_labels=3)
    ids = windows(2)
    expected = model.base_model(ids)[0]
    with torch.no_grad():
        assert torch.equal(again.base_model(ids)[0], expected)
    again.save_pretrained(tmp_path / "tuned")
    tuned = other.from_pretrained(tmp_path / "tuned")
    own = [n for n, _ in again.named_parameters() if not n.startswith(again.base_model_prefix)]
    assert own and all(torch.equal(tuned.get_parameter(n), again.get_parameter(n)) for n in own)
    stored = Shards(tmp_path)
    gone = next(n for n in stored.names if "norm" in n or "ln_" in n)
    from safetensors.torch import save_file

    kept = {n: stored.read(n) for n in stored.names if n != gone}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="lacks the tensor"):
        other.from_pretrained(tmp_path, num_labels=3)


def test_a_model_in_its_own_class_may_not_lack_its_head(tmp_path):
    from safetensors.torch import save_file

    from spectrim.errors import ArtifactError

    compressed("llama").save_pretrained(tmp_path)
    stored = Shards(tmp_path)
    kept = {n: stored.read(n) for n in stored.names if n != "lm_head.weight"}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lacks the tensor 'lm_head\.weight'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_tiny_still_covers_every_plain_architecture():
    assert Conversions(tiny("llama")[0], ["model.norm.weight", "other"]).unused == ["other"]
