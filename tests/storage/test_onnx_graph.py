"""The exported graph computes what the model computes, in ONNX Runtime and in OpenVINO."""

import builtins
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from architectures import tiny, windows
from spectrim import api
from spectrim.errors import InputError, MissingExtraError
from spectrim.layers.quantized import quantize_layer
from spectrim.layers.swap import compressed_layers
from spectrim.storage.attach import attach
from storage_cases import compressed, save


def runtime(file):
    engine = pytest.importorskip("onnxruntime")
    session = engine.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def openvino(file):
    ov = pytest.importorskip("openvino")
    compiled = ov.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [one.get_any_name() for one in compiled.outputs]
    return lambda inputs: dict(zip(names, compiled(inputs).values(), strict=True))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("graph")
    model = compressed(model=tiny("llama")[0]).eval()
    save(model, folder / "out")
    api.export(folder / "out", output=folder / "graph", to="onnx")
    return model, folder / "graph"


@pytest.mark.parametrize("engine", [runtime, openvino])
def test_an_engine_continues_from_its_own_cache_as_the_model_does(engine, exported):
    model, folder = exported
    run = engine(folder / "model.onnx")
    c = model.config
    size = c.hidden_size // c.num_attention_heads
    empty = np.zeros((3, c.num_key_value_heads, 0, size), dtype=np.float32)
    pairs = [f"{i}.{part}" for i in range(c.num_hidden_layers) for part in ("key", "value")]
    ids = windows(3, 9)
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    first = run({"input_ids": ids[:, :6].numpy()} | {f"past_key_values.{p}": empty for p in pairs})
    kept = {f"past_key_values.{p}": first[f"present.{p}"] for p in pairs}
    second = run({"input_ids": ids[:, 6:].numpy(), **kept})
    found = np.concatenate([first["logits"], second["logits"]], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_an_export_says_nothing_of_what_is_not_ours(tmp_path):
    """Neither of packages that are absent nor of torch's own deprecations."""
    pytest.importorskip("onnxscript")
    tiny("llama")[0].save_pretrained(tmp_path / "dense")
    words = f"from spectrim import api; api.export({str(tmp_path / 'dense')!r}, "
    words += f"output={str(tmp_path / 'graph')!r}, to='onnx')"
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    said = [
        line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line
    ]
    assert not said and (tmp_path / "graph" / "model.onnx").is_file()


def test_factors_stay_two_products(exported):
    onnx = pytest.importorskip("onnx")
    model, folder = exported
    graph = onnx.load(folder / "model.onnx").graph
    shapes = {tuple(sorted(one.dims)) for one in graph.initializer if len(one.dims) == 2}
    for layer in compressed_layers(model).values():
        for part in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            assert tuple(sorted(part.weight.shape)) in shapes
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    model = compressed()
    for layer in compressed_layers(model).values():
        quantize_layer(layer, "int8", dtype=torch.float32)
    attach(model)
    save(model, tmp_path / "int8")
    monkeypatch.setattr("spectrim.storage.onnx_graph._require", lambda: None)
    with pytest.raises(InputError, match="let the engine round it"):
        api.export(tmp_path / "int8", output=tmp_path / "graph", to="onnx")
    monkeypatch.undo()
    plain = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "onnxscript":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"spectrim\[onnx\]"):
        api.export(tmp_path / "int8", output=tmp_path / "graph", to="onnx")
    assert not (tmp_path / "graph").exists()
