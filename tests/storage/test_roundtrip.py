import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import auto

import spectrim.storage.quantizer
from architectures import ARCHITECTURES, tiny, windows
from jobs import copied, same_state
from spectrim import registration
from spectrim.errors import ArtifactError, ModelError
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.quantized import quantize_layer
from spectrim.layers.swap import compressed_layers, is_compressed, swap_in
from spectrim.storage.attach import attach
from spectrim.storage.inspect import inspect_folder
from spectrim.storage.renaming import renamings
from storage_cases import compressed, linear_names, save


def logits(model):
    with torch.no_grad():
        return model(windows(2)).logits.float()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_save_and_load_are_exact(name, tmp_path):
    model = compressed(name)
    expected = logits(model)
    model.save_pretrained(tmp_path / "once", max_shard_size="40KB")
    once = AutoModelForCausalLM.from_pretrained(tmp_path / "once")
    assert len(list((tmp_path / "once").glob("*.safetensors"))) > 1
    assert compressed_layers(once).keys() == compressed_layers(model).keys()
    assert torch.equal(logits(once), expected)
    once.save_pretrained(tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice", device_map="auto")
    assert torch.equal(logits(twice), expected)
    generated = twice.generate(windows(1, 4), min_new_tokens=3, max_new_tokens=3, pad_token_id=0)
    assert generated.shape == (1, 7)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_dequantize_gives_the_ordinary_model_back(name, tmp_path):
    original, _ = tiny(name)
    kinds = {n: type(original.get_submodule(n)) for n in linear_names(original)}
    model = compressed(name)
    expected = logits(model)
    model.save_pretrained(tmp_path / "factors")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "factors").dequantize()
    assert {n: type(dense.get_submodule(n)) for n in kinds} == kinds
    dense.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not compressed_layers(again)
    assert torch.allclose(logits(again), expected, atol=1e-4)


def test_the_flag_in_the_config_loads_dense_weights(tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config["dequantize"] = True
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert not compressed_layers(dense)
    assert not hasattr(dense.config, "quantization_config")
    assert torch.allclose(logits(dense), logits(model), atol=1e-4)


def test_bfloat16_and_a_change_of_dtype(tmp_path):
    # Loaded, not cast: `.to` would round the rotary frequencies as well, loading does not.
    tiny("qwen2")[0].save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    model = compressed(model=model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(again), logits(model))
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert logits(wide).isfinite().all()
    for (name, a), (_, b) in zip(again.named_parameters(), wide.named_parameters(), strict=True):
        assert torch.equal(a.float(), b), name
    assert {p.dtype for p in again.to(torch.float16).parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])
def test_the_bare_model_loads_from_a_checkpoint_with_head_and_back(name, tmp_path):
    model = compressed(name)
    model.save_pretrained(tmp_path / "head")
    bare = AutoModel.from_pretrained(tmp_path / "head")
    expected = model.base_model(windows(2))[0]
    assert torch.equal(bare(windows(2))[0], expected)
    bare.save_pretrained(tmp_path / "bare")
    headed = AutoModelForCausalLM.from_pretrained(tmp_path / "bare")
    assert torch.equal(headed.base_model(windows(2))[0], expected)


def test_a_compressed_head_is_untied_and_optional(tmp_path):
    model = tiny("qwen3")[0]
    assert model.config.tie_word_embeddings
    model = compressed(model=model, extra=["lm_head"], kinds=("factored",))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_compressed(again.lm_head)
    assert torch.equal(logits(again), logits(model))
    bare = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(bare(windows(2))[0], model.base_model(windows(2))[0])


def test_tied_embeddings_stay_tied_and_are_stored_once(tmp_path):
    model = compressed("qwen3")
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.get_input_embeddings().weight


def test_a_refit_after_loading_is_what_gets_saved(tmp_path):
    model = compressed(kinds=("factored",))
    model.save_pretrained(tmp_path / "a")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    name, old = next(iter(compressed_layers(model).items()))
    smaller = LowRankLinear.from_factors(
        old.up.weight[:, :2], old.down.weight[:2], old.bias, dtype=torch.float32, device="cpu"
    )
    swap_in(model, name, smaller)
    model.save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert compressed_layers(again)[name].rank == 2
    assert torch.equal(logits(again), logits(model))


def test_training_reaches_the_factors(tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    model(windows(2), labels=windows(2)).loss.backward()
    layers = compressed_layers(model).values()
    assert all(p.grad is not None for layer in layers for p in layer.parameters())
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_qat_trainable
    assert model.hf_quantizer.is_compileable


@pytest.fixture
def unregistered(monkeypatch):
    """transformers as it is where spectrim was never imported."""
    for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        monkeypatch.delitem(table, "spectrim")
    monkeypatch.setattr(spectrim.storage, "quantizer", spectrim.storage.quantizer)
    monkeypatch.delitem(sys.modules, registration.OURS[auto.__name__])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_a_loader_without_spectrim_stops_and_goes_on_after_the_import(name, tmp_path, unregistered):
    compressed(name).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    registration.register()
    assert compressed_layers(AutoModelForCausalLM.from_pretrained(tmp_path))


def waiting():
    return [f.awaited for f in sys.meta_path if isinstance(f, registration._Await)]


def test_where_spectrim_is_imported_first_it_waits_for_transformers(unregistered, monkeypatch):
    """The module that is awaited is executed anew, and found as at its first import."""
    monkeypatch.setattr(transformers.quantizers, "auto", auto)
    monkeypatch.delitem(sys.modules, auto.__name__)
    registration.register()
    assert auto.__name__ in waiting()
    again = importlib.import_module(auto.__name__)
    assert again is not auto and "spectrim" in again.AUTO_QUANTIZER_MAPPING
    assert auto.__name__ not in waiting()


def test_other_strict_loaders_stop_too(tmp_path):
    model = compressed("llama")
    model.save_pretrained(tmp_path)
    dense, _ = tiny("llama")
    with pytest.raises(RuntimeError, match="size mismatch"):
        dense.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)


def test_no_name_is_renamed_wrongly():
    """32 layers, some compressed: exactly the intended keys change, in both directions."""
    projections = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    names = [f"model.layers.{i}.{p}" for i in range(32) for p in projections]
    storages = {n: ("packed" if i % 3 else "factored") for i, n in enumerate(names) if i % 4 != 1}
    dense = [n for n in names if n not in storages]
    others = [f"vision.{n}.weight" for n in storages] + [f"{n}.weight_scale" for n in storages]
    others += [f"{n}.weight.absmax" for n in storages] + ["lm_head.weight", "model.norm.weight"]
    forward = renamings({name: (kind, "native") for name, kind in storages.items()}, "model")
    backward = [r.reverse_transform() for r in forward[::-1]]
    intended = {"factored": "up.weight", "packed": "basis.weight"}

    def applied(key, transforms):
        for transform in transforms:
            key, _ = transform.rename_source_key(key)
        return key

    for key in [*others, *(f"{n}.{part}" for n in dense for part in ("weight", "bias"))]:
        assert applied(key, forward) == key
        assert applied(key, backward) == key
    for name, kind in storages.items():
        for path in (name, name.removeprefix("model.")):
            memory = f"{path}.{intended[kind]}"
            assert applied(f"{path}.weight", forward) == memory
            assert applied(memory, backward) == f"{path}.weight"
            bias = f"{path}.up.bias" if kind == "factored" else f"{path}.bias"
            assert applied(f"{path}.bias", forward) == bias
            assert applied(bias, backward) == f"{path}.bias"
            assert applied(f"{path}.down.weight", forward) == f"{path}.down.weight"


def test_importing_spectrim_is_light():
    code = """
import sys
import spectrim
assert not {"torch", "transformers", "pydantic"} & set(sys.modules)
waiting = [f for f in sys.meta_path if type(f).__module__ == "spectrim.registration"]
assert len(waiting) == 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_full_rank_layer_is_refused_before_it_can_be_mistaken():
    model, _ = tiny("llama")
    name = linear_names(model)[0]
    n = model.get_submodule(name).in_features
    factors = torch.eye(n)
    layer = LowRankLinear.from_factors(factors, factors, None, dtype=torch.float32, device="cpu")
    swap_in(model, name, layer)
    with pytest.raises(ModelError, match="leave this target dense"):
        attach(model)


def test_another_quantization_config_is_refused(tmp_path):
    compressed().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="SpectrimConfig"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True)
        )


def edited(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def first_layer(table):
    return next(iter(table["layers"].values()))


def test_unknown_keys_survive_a_round_trip(tmp_path):
    compressed().save_pretrained(tmp_path)

    def change(table):
        table["inner"] = {"bits": 4}
        first_layer(table)["note"] = "kept"

    edited(tmp_path, change)
    AutoModelForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    table = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
    assert table["inner"] == {"bits": 4}
    assert first_layer(table)["note"] == "kept"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(format_version=7), "format_version 7.*upgrade"),
        (lambda t: first_layer(t).update(storage="zip"), "unknown storage 'zip'"),
        (lambda t: first_layer(t).update(weights="int3"), "'int3'.*native"),
        (lambda t: first_layer(t).update(rank=0), r"rank.*greater than"),
        (lambda t: first_layer(t).update(rank=39), "asks for|has rank"),
        (lambda t: first_layer(t).update(rank=4000), "has rank 4000"),
        (lambda t: t["layers"].update({"layers.0.nothing": {"rank": 2, "storage": "factored"}}),
         "no such module"),
        (lambda t: t["layers"].update({"layers.0.input_layernorm": {"rank": 2,
         "storage": "factored"}}), "RMSNorm"),
        (lambda t: t["layers"].update({"../../etc": {"rank": 2, "storage": "factored"}}),
         "damaged or not written by spectrim"),
        (lambda t: t.update(layers=[1, 2]), "damaged or not written by spectrim"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_true_is_refused(change, message, tmp_path):
    compressed().save_pretrained(tmp_path)
    edited(tmp_path, change)
    with pytest.raises(ArtifactError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def rewritten(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.layers.0.self_attn.k_proj.down.weight", None, "lacks the tensor"),
        ("model.layers.0.self_attn.k_proj.weight", torch.ones(20, 6), r"shape \[20, 6\]"),
        ("model.layers.0.self_attn.v_proj.order", torch.zeros(20, dtype=torch.int32),
         "not a permutation"),
        ("model.layers.0.self_attn.v_proj.order", torch.ones(20), "dtype F32"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(key, value, message, tmp_path):
    compressed().save_pretrained(tmp_path)

    def change(tensors):
        assert key in tensors
        del tensors[key]
        if value is not None:
            tensors[key] = value

    rewritten(tmp_path, change)
    with pytest.raises(ArtifactError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_truncated_file_is_refused_with_file_and_tensor(tmp_path):
    save(compressed(), tmp_path / "out", max_shard_size="40KB")
    path = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=rf"{path.name} is truncated: tensor 'model\."):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_pickled_weights_are_refused(tmp_path):
    compressed().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_folder_is_left_alone(tmp_path):
    model, _ = tiny("llama")
    attach(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads(Path(tmp_path / "config.json").read_text())


@pytest.mark.parametrize("cast", ["half", "float", "bfloat16"])
@pytest.mark.parametrize("weights", ["native", "int8"])
def test_a_loaded_model_is_cast_and_saved_with_report_recipe_and_card(cast, weights, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    model = compressed("llama")
    for name, layer in compressed_layers(model).items():
        if weights == "int8":
            swap_in(model, name, quantize_layer(layer, "int8", dtype=torch.float32))
    save(model, first)
    (first / "LICENSE").write_text("Terms.", encoding="utf-8")
    loaded = AutoModelForCausalLM.from_pretrained(first).eval()
    getattr(loaded, cast)()
    expected = logits(loaded)
    assert torch.allclose(expected, logits(model), rtol=0.05, atol=0.15)
    loaded.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, dtype="auto")
    assert reloaded.dtype == loaded.dtype and same_state(reloaded, loaded)
    # half() and bfloat16() round the angles of rotary embeddings as well, which are not stored.
    assert torch.allclose(logits(reloaded), expected, rtol=0.05, atol=0.15)
    for name in ("recipe.yaml", "LICENSE"):
        assert (again / name).read_bytes() == (first / name).read_bytes()
    report = json.loads((again / "spectrim_report.json").read_text(encoding="utf-8"))
    assert report["quality"] == 1.5
    assert report["stored"] == inspect_folder(again).summary()
    said = (again / "README.md").read_text(encoding="utf-8")
    assert said.startswith((first / "README.md").read_text(encoding="utf-8").rstrip())
    assert ("saved again from memory in " in said) == (cast != "float")


def test_what_lies_in_the_folder_already_is_not_replaced(tmp_path):
    save(compressed("llama"), tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "README.md").write_text("Mine.", encoding="utf-8")
    copied(loaded).half().save_pretrained(tmp_path / "again")
    assert loaded.dtype == torch.float32  # the copy's methods are its own
    assert (tmp_path / "again" / "README.md").read_text(encoding="utf-8") == "Mine."
    assert (tmp_path / "again" / "spectrim_report.json").is_file()
    # Multiplied out it is no result any more, and nothing of one goes along.
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / "spectrim_report.json").exists()
