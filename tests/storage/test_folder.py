import errno
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, modeling_utils

import spectrim
from architectures import ARCHITECTURES, tiny, windows
from spectrim.errors import ArtifactError, ModelError, OutputError
from spectrim.layers.swap import compressed_layers
from spectrim.storage.atomic import new_folder
from spectrim.storage.card import Card
from spectrim.storage.dense import export_dense
from spectrim.storage.folder import Papers, save_model
from spectrim.storage.inspect import inspect_folder
from spectrim.storage.origin import read_origin
from spectrim.storage.table import QUANT_METHOD
from storage_cases import compressed, linear_names, save


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """A folder that tests only read, its model, and what saving returned."""
    folder = tmp_path_factory.mktemp("result") / "out"
    model = compressed("qwen2")
    return folder, model, save(model, folder, max_shard_size="40KB")


def test_a_result_holds_everything_and_nothing_pickled(result):
    folder, _, inspection = result
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "recipe.yaml", "README.md"} <= names
    assert {Path(n).suffix for n in names} == {".json", ".safetensors", ".yaml", ".md"}
    report = json.loads((folder / "spectrim_report.json").read_text())
    assert report["quality"] == 1.5
    assert report["stored"]["achieved_keep"] == inspection.achieved_keep
    assert report["stored"]["files"] == dict(inspection.files)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == QUANT_METHOD
    assert config["format_version"] == 1
    assert config["provenance"]["recipe"] == "test"
    assert all(name.startswith("layers.") for name in config["layers"])
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_inspection_counts_what_lies_on_disk(name, tmp_path):
    original, _ = tiny(name)
    dense = {n: original.get_submodule(n) for n in linear_names(original)}
    model = compressed(name)
    inspection = save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert inspection.bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    orders = torch.int32  # of packed layers: stored, but no parameters
    counted = (t for t in tensors.values() if t.dtype != orders)
    assert inspection.parameters == sum(t.numel() for t in counted)
    assert sum(inspection.files.values()) == (tmp_path / "out/model.safetensors").stat().st_size
    layers = compressed_layers(model)
    by_name = {target.name: target for target in inspection.targets}
    assert by_name.keys() == dense.keys()
    for path, old in dense.items():
        target = by_name[path]
        state = (layers.get(path) or old).state_dict()
        assert target.bytes == sum(t.numel() * t.element_size() for t in state.values())
        assert target.dense_bytes == sum(p.numel() * 4 for p in old.parameters())
        assert target.rank == (layers[path].rank if path in layers else None)
        m, n = old.weight.shape if name != "gpt2" else old.weight.T.shape
        assert (target.out_features, target.in_features) in {(m, n)}
    kept = sum(t.bytes for t in by_name.values()) / sum(t.dense_bytes for t in by_name.values())
    assert inspection.achieved_keep == kept


def test_inspection_needs_no_torch(result):
    code = (
        "import sys; from spectrim.storage.inspect import inspect_folder\n"
        f"print(inspect_folder({str(result[0])!r}).bytes)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(run.stdout) == result[2].bytes


def test_an_ordinary_model_can_be_inspected(tmp_path):
    model, _ = tiny("llama")
    inspection = save(model, tmp_path / "out")
    assert inspection.table is None
    assert inspection.achieved_keep is None
    assert inspection.dense_bytes == inspection.bytes == 4 * model.num_parameters()


def test_an_unattached_model_is_refused(tmp_path):
    model = compressed()
    del model.hf_quantizer
    with pytest.raises(ModelError, match="attach"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dense_export_needs_no_spectrim(name, tmp_path):
    model = compressed(name)
    save(model, tmp_path / "out")
    (tmp_path / "out/tokenizer.json").write_text("{}")
    export_dense(tmp_path / "out", tmp_path / "dense")
    dense = tmp_path / "dense"
    config = json.loads((dense / "config.json").read_text())
    assert "quantization_config" not in config
    assert {path.name for path in dense.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "README.md", "tokenizer.json",
        "spectrim_manifest.json",
    }  # fmt: skip
    original, _ = tiny(name)
    shapes = {n: t.shape for n, t in load_file(dense / "model.safetensors").items()}
    original.save_pretrained(tmp_path / "original")
    stored = load_file(tmp_path / "original/model.safetensors")
    assert shapes == {n: t.shape for n, t in stored.items()}
    again = AutoModelForCausalLM.from_pretrained(dense)
    assert torch.allclose(again(windows(2)).logits, model(windows(2)).logits, atol=1e-4)


def test_exporting_an_ordinary_model_is_refused(tmp_path):
    tiny("llama")[0].save_pretrained(tmp_path / "plain")
    with pytest.raises(ArtifactError, match="no model compressed by spectrim"):
        export_dense(tmp_path / "plain", tmp_path / "dense")


def fill(folder, text):
    (folder / "config.json").write_text(text)


def test_a_new_folder_appears_only_when_it_is_finished(tmp_path):
    output = tmp_path / "deep" / "out"
    with new_folder(output) as folder:
        fill(folder, "new")
        assert not output.exists()
        assert folder.parent == output.parent
    assert (output / "config.json").read_text() == "new"
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_an_existing_folder_is_replaced_only_on_request(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    with new_folder(output) as folder:
        fill(folder, "first")
    with pytest.raises(OutputError, match="--overwrite"), new_folder(output) as folder:
        fill(folder, "second")
    assert (output / "config.json").read_text() == "first"
    with new_folder(output, overwrite=True) as folder:
        fill(folder, "third")
        (folder / "more.json").write_text("x")
    with new_folder(output, overwrite=True) as folder:
        fill(folder, "third")
    names = {path.name for path in output.iterdir()}
    assert names == {"config.json", "spectrim_manifest.json"}
    assert (output / "config.json").read_text() == "third"


def test_a_folder_that_is_no_model_is_never_replaced(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(OutputError, match="did not write it"),
        new_folder(home, overwrite=True) as folder,
    ):
        fill(folder, "x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not a folder"), new_folder(tmp_path / "file"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "home"]


def test_equal_runs_write_equal_files(tmp_path):
    """All but the report, which has times, and the manifest, which has the report's hash."""
    for turn in range(3):
        spectrim.compress(tiny("llama")[0], recipe="svd", keep=0.6, output=tmp_path / str(turn))
    first, *others = [
        {p.name: p.read_bytes() for p in (tmp_path / str(turn)).iterdir()} for turn in range(3)
    ]
    for other in others:
        differing = {name for name in first.keys() | other.keys() if first[name] != other[name]}
        assert differing <= {"spectrim_report.json", "spectrim_manifest.json"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), None])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, error, overwrite):
    """The second shard fails: as an `OSError`, and as the error that safetensors raises itself."""
    output = tmp_path / "out"
    model = compressed()
    if overwrite:
        save(model, output)
    before = {p.name: p.read_bytes() for p in output.iterdir()} if overwrite else None
    real, calls = modeling_utils.safe_save_file, []

    def fails(tensors, filename, **options):
        calls.append(filename)
        if len(calls) < 2:
            return real(tensors, filename, **options)
        if error is None:
            return save_file({"a": torch.ones(2)}, Path(filename) / "no" / "such" / "folder")
        raise error

    monkeypatch.setattr(modeling_utils, "safe_save_file", fails)
    with pytest.raises(OutputError, match="could not be written"):
        save(model, output, max_shard_size="40KB", overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if overwrite else [])
    if overwrite:
        assert {p.name: p.read_bytes() for p in output.iterdir()} == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_leaves_nothing_behind(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out") as folder:
        fill(folder, "half")
        raise error
    assert not list(tmp_path.iterdir())


def test_a_failed_rename_restores_what_was_there(tmp_path, monkeypatch):
    output = tmp_path / "out"
    with new_folder(output) as folder:
        fill(folder, "old")
    rename = Path.rename

    def fails(path, target):
        if "partial" in path.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OutputError), new_folder(output, overwrite=True) as folder:
        fill(folder, "new")
    assert (output / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_report_with_nan_is_a_mistake_that_leaves_nothing(tmp_path):
    report = {"quality": float("nan")}
    with pytest.raises(ValueError, match="JSON"):
        save_model(compressed(), None, tmp_path / "out", Papers("", report, ""))
    assert not list(tmp_path.iterdir())


def index_of(folder):
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "a\\b", "", 3, "no.safetensors"])  # fmt: skip  # noqa: E501
def test_names_in_an_index_never_leave_the_folder(name, tmp_path):
    save(compressed(), tmp_path / "out", max_shard_size="40KB")
    index = json.loads(index_of(tmp_path / "out").read_text())
    index["weight_map"]["model.norm.weight"] = name
    index_of(tmp_path / "out").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=r"not the name of|lacks 'no\.safetensors'"):
        inspect_folder(tmp_path / "out")


def test_inspection_refuses_contradictions(tmp_path):
    folder = tmp_path / "out"
    save(compressed(), folder)
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rank": 5', '"rank": 6', 1))
    with pytest.raises(ArtifactError, match="do not fit"):
        inspect_folder(folder)
    config.write_text(text)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.down.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"lacks the tensor .*k_proj\.down\.weight"):
        inspect_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="holds neither"):
        inspect_folder(folder)


def measured(text="heldout.txt"):
    return {
        "text": text,
        "what": "another text than the run was calibrated on",
        "windows": 12,
        "window_length": 256,
        "dense": {"perplexity": 41.434},
        "compressed": {"perplexity": 45.52},
    }


def original(folder, license="apache-2.0"):
    folder.mkdir()
    front = f"---\nlicense: {license}\nlanguage: [en, 'no']\nmodel-index: x\n---\n# Base\n"
    (folder / "README.md").write_text(front)
    (folder / "LICENSE.txt").write_text("the terms")
    (folder / "NOTICE").write_text("names")
    (folder / "licenses.bin").write_bytes(bytes(2**21))
    return folder


def test_the_card_is_what_the_hub_reads(tmp_path):
    origin = replace(read_origin(original(tmp_path / "base")), hub_id="org/model-1B")
    card = Card(
        "A | title",
        base_model="org/model-1B",
        recipe_name="svd-llm",
        recipe_yaml="title: has ``` in it\ntext: /home/me/a.txt\n",
        numbers={"a|b": ("1", "2")},
        protocol="WikiText-2, 2048 tokens.",
        notes=["See /home/me/notes.txt."],
        origin=origin,
        measured=[measured("/home/me/heldout.txt")],
    ).text()
    read = ModelCard(card).data
    assert (read.license, read.language) == ("apache-2.0", ["en", "no"])
    assert (read.library_name, read.pipeline_tag) == ("transformers", "text-generation")
    assert read.base_model == "org/model-1B"
    found = [(r.metric_type, r.metric_value, r.dataset_name) for r in read.eval_results]
    assert found == [("perplexity", 45.52, "heldout.txt"), ("perplexity", 41.434, "heldout.txt")]
    for expected in (
        "import spectrim",
        "## What is lost",
        r"| a\|b | 1 | 2 |",
        "| perplexity, heldout.txt | 41.43 | 45.52 |",
        "(apache-2.0); see `LICENSE.txt`, `NOTICE`",
        "````yaml\ntitle: has ``` in it\ntext: a.txt\n````",
    ):
        assert expected in card
    assert "/home" not in card


def test_a_card_without_origin_says_what_is_not_known():
    card = Card("x", "/data/models/x", "svd", recipe_yaml="", numbers={}).text()
    assert "/data" not in card
    assert "base_model" not in card.split("---\n")[1]
    assert "names no license" in card and "Quality was not measured" in card


def test_license_and_languages_are_carried_over_and_nothing_else(tmp_path):
    found = read_origin(original(tmp_path / "base"))
    assert dict(found.matter) == {"license": "apache-2.0", "language": ["en", "no"]}
    assert [path.name for path in found.files] == ["LICENSE.txt", "NOTICE"]
    odd = original(tmp_path / "odd", license="{a: [}")
    assert read_origin(odd).matter == {}
    assert read_origin("LlamaForCausalLM") == read_origin(tmp_path / "nowhere" / "x" / "y")
