"""Folders as strangers send them: each is refused with one line that says what to do."""

import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from architectures import tiny
from spectrim.errors import ArtifactError, InputError, ModelError, RecipeError
from spectrim.recipe import Recipe
from spectrim.run.loading import load_model
from spectrim.run.working import resolve_device, resolve_dtype
from spectrim.storage.dense import export_dense
from spectrim.storage.inspect import inspect_folder
from storage_cases import compressed, save


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    model, _ = tiny("llama")
    model.save_pretrained(folder / "dense")
    model.save_pretrained(folder / "shards", max_shard_size="60KB")
    save(compressed("llama"), folder / "compressed")
    return folder


@pytest.fixture
def copy(sources, tmp_path):
    def make(name):
        return shutil.copytree(sources / name, tmp_path / name)

    return make


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused_unread(copy, tmp_path, name):
    folder = copy("dense")
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    for reader in (load_model, inspect_folder):
        with pytest.raises(ModelError, match=rf"{name}.*convert them once"):
            reader(folder)
    assert not (tmp_path / "sprung").exists()


CODE = "open({path!r}, 'w').write('x')\nclass Model: pass\nclass Config: pass\n"


@pytest.mark.parametrize("model_type", ["llama", "something-new"])
def test_code_that_comes_with_a_checkpoint_is_not_run(copy, tmp_path, model_type):
    folder = copy("dense")
    code = CODE.format(path=str(tmp_path / "sprung"))
    for name in ("modeling_x.py", "configuration_x.py"):
        (folder / name).write_text(code)
    names = {"AutoConfig": "configuration_x.Config", "AutoModelForCausalLM": "modeling_x.Model"}
    edit(folder / "config.json", auto_map=names, model_type=model_type)
    if model_type == "llama":
        # transformers' own class fits; the result must not point to the code any more.
        loaded = load_model(folder)
        loaded.model.save_pretrained(tmp_path / "again")
        assert "auto_map" not in json.loads((tmp_path / "again/config.json").read_text())
    else:
        with pytest.raises(ModelError, match=r"auto_map.*--trust-remote-code"):
            load_model(folder)
    assert not (tmp_path / "sprung").exists()


def test_missing_weights_are_refused_and_code_is_named_as_a_cause(copy):
    folder = copy("dense")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .*model\.norm\.weight.*random"):
        load_model(folder)
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "x.Y"})
    with pytest.raises(ModelError, match="--trust-remote-code"):
        load_model(folder)


def test_a_weight_that_is_no_target_may_not_be_missing_either(copy):
    folder = copy("compressed")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lacks the tensor 'model\.norm\.weight'"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["../dense/model.safetensors", "/tmp/x.safetensors", "a/b.safetensors"])  # fmt: skip  # noqa: E501
def test_an_index_does_not_lead_out_of_the_folder(copy, name):
    copy("dense")
    folder = copy("shards")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=weight_map | {"lm_head.weight": name})
    with pytest.raises(ArtifactError, match="not the name of a safetensors file"):
        load_model(folder)


def test_transformers_does_not_read_a_result_from_elsewhere(copy, tmp_path):
    folder = copy("compressed")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="outside of it"):
        AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["dense", "shards", "compressed"])
def test_a_folder_may_be_named_by_any_path(copy, monkeypatch, tmp_path, kind):
    folder = copy(kind)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(folder)
    for name in (f"../{kind}", "../link", str(folder), f"{folder}/"):
        load_model(name)
        AutoModelForCausalLM.from_pretrained(name)


@pytest.mark.parametrize("kind", ["dense", "shards", "compressed"])
def test_a_truncated_file_is_named_with_its_tensor(copy, kind):
    folder = copy(kind)
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArtifactError, match=rf"{path.name} is truncated: tensor '"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"text_config": {"num_experts": 10**9}}, "num_experts"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"transformers_weights": "../x.safetensors"}, "transformers_weights"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(copy, changes, message):
    folder = copy("dense")
    edit(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_an_adapter_is_no_model(copy):
    folder = copy("dense")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}')
    with pytest.raises(ModelError, match="merge it first"):
        load_model(folder)


def test_an_export_copies_data_and_no_code(copy, tmp_path):
    folder = copy("compressed")
    for name in ("tokenizer.json", "tool.py", "training_args.bin", "chat_template.jinja"):
        (folder / name).write_text("{}")
    export_dense(folder, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} <= names
    assert not names & {"tool.py", "training_args.bin"}


@pytest.mark.parametrize("device", ["banana", "meta", "cuda:99", "mps:7"])
def test_a_device_that_is_not_there_names_those_that_are(device):
    with pytest.raises(InputError, match=r"this machine has auto, cpu|holds no numbers"):
        resolve_device(device)


@pytest.mark.parametrize("dtype", ["fp8", "int8", torch.int8, torch.float8_e4m3fn])
def test_a_dtype_that_nothing_works_in_names_those_that_do(dtype):
    with pytest.raises(InputError, match="bfloat16"):
        resolve_dtype(dtype, torch.float32, torch.device("cpu"))


def test_a_stored_dtype_that_no_layer_has_is_refused(copy):
    folder = copy("compressed")
    tensors = load_file(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith(".down.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"dtype F8_E4M3, the layer holds F32 or BF16"):
        AutoModelForCausalLM.from_pretrained(folder)


BOMB = "a: &a [x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}]\n" for old, new in zip("abcdefghi", "bcdefghij", strict=True)
)


NO_RECIPES = (
    BOMB,
    "[" * 5000,
    "seed: 2001-99-99",
    "seed: !!int ''",
    "!!python/name:os.system ''",
    "keep: [",
    "\x00",
)


@pytest.mark.parametrize("text", NO_RECIPES)
def test_a_recipe_file_is_data_and_no_larger_than_it_looks(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError):
        Recipe.from_file(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.from_file(path)
