"""The examples run as they are, on a tiny model and a small text, and do what they say."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import urllib.request
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from architectures import tiny
from spectrim.decompose import OBJECTIVES
from spectrim.demo.run import CALIBRATION
from spectrim.demo.run import MODEL as BUNDLED
from spectrim.layers.swap import compressed_layers

EXAMPLES = Path(__file__).parents[1] / "examples"
QUICK = {"recipe": "svd-llm", "windows": 4, "window_length": 32}


def load(name):
    spec = spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = module_from_spec(spec)
    sys.modules[name] = module  # as an import would, so that the file can name itself
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model with its tokenizer, and a text."""
    folder = tmp_path_factory.mktemp("examples")
    small = {"vocab_size": 4096, "max_position_embeddings": 64, "num_hidden_layers": 2}
    tiny("llama", **small)[0].save_pretrained(folder / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED / name, folder / "m")
    text = folder / "text.txt"
    text.write_text(CALIBRATION.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    return folder / "m", text


@pytest.fixture(scope="module")
def compressed(given, tmp_path_factory):
    output = tmp_path_factory.mktemp("compressed") / "out"
    return load("compress_and_load").main(*given, output, measure=False, **QUICK), output


def test_every_example_is_in_the_table():
    listed = re.findall(r"`(\w+\.py)`", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))


def size_of(folder):
    return (folder / "model.safetensors").stat().st_size


def test_compress_and_load(given, compressed):
    model, output = compressed
    assert compressed_layers(model)
    assert size_of(output) < size_of(given[0])


def test_every_size(given, tmp_path, capsys):
    elastic = load("every_size").main(*given, tmp_path, **QUICK)
    kept = [float(k) for k in re.findall(r"^(\d\.\d+) of the bytes", capsys.readouterr().out, re.M)]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 3
    assert elastic.plan.achieved_keep == pytest.approx(kept[-1], abs=1e-3)
    assert compressed_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "at-0.7"))


def test_own_plan(given, tmp_path):
    result = load("own_plan").main(*given, tmp_path / "out", **QUICK)
    names = [entry.name for entry in result.plan.entries]
    assert names and not [name for name in names if ".layers.0." in name]
    assert result.plan.achieved_keep < result.plan.keep
    assert not [n for n in compressed_layers(result.model) if ".layers.0." in n]


def test_new_objective(given, tmp_path):
    before = dict(OBJECTIVES)
    try:
        module = load("new_objective")
        options = {"windows": 4, "window_length": 32, "measure": False}
        result = module.main(*given, tmp_path / "out", **options)
    finally:
        OBJECTIVES.clear()
        OBJECTIVES.update(before)
    assert result.recipe.decompose.model_dump()["power"] == 0.5
    layer = next(iter(compressed_layers(result.model).values()))
    assert torch.isfinite(next(layer.parameters())).all()
    assert 0.5 < result.plan.achieved_keep <= 0.6


def test_inside_training(given, tmp_path):
    losses = load("inside_training").main(*given, tmp_path, steps=3, batch=2, length=32)
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    before, after = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("compressed", "trained")
    )
    layers = compressed_layers(after)
    assert layers and layers.keys() == compressed_layers(before).keys()
    assert not torch.equal(after.lm_head.weight, before.lm_head.weight)


def test_serve(compressed):
    served = load("serve").server(compressed[1], 0, new_tokens=4)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    try:
        request = urllib.request.Request(
            f"http://127.0.0.1:{served.server_port}", data=b"The old house", method="POST"
        )
        answer = urllib.request.urlopen(request, timeout=60).read().decode()
    finally:
        served.shutdown()
        served.server_close()
    assert answer.startswith("The old house") and len(answer) > len("The old house")
