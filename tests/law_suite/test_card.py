"""On a CUDA card: the results of the CPU, restored matrices, out of core, memory as predicted.

What an imitation cannot see (`test_second_device.py`): kernels of other precision, memory, and
dtypes that only a card is given. All of it is skipped without one.
"""

import math

import pytest
import torch

from architectures import windows
from quick_recipes import quick
from spectrim import api
from spectrim.demo.run import CALIBRATION, MODEL
from spectrim.devices import accelerator, forget_peak_memory, peak_memory
from spectrim.layers.swap import compressed_layers
from spectrim.recipes import PRESETS
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

KEEP = 0.6
GAP = 0.002
"""Of the mean loss per token, between a card and the CPU."""

ROUNDING = 2e-2
"""Relative, of logits: a few roundings to bf16 in every layer."""

QUICK = {"text": str(CALIBRATION), "windows": 32, "window_length": 128}


def device():
    found = accelerator()
    assert found is not None
    return found


def loss(model, place):
    found = api.evaluate(model, text=str(CALIBRATION), max_tokens=16384, device=place)
    return math.log(found["texts"][0]["perplexity"]["value"])


@pytest.mark.parametrize("name", PRESETS)
def test_every_recipe_gives_the_result_of_the_cpu(name, tmp_path):
    if name == "svd-llm-lora":
        pytest.importorskip("peft")
    recipe = quick(PRESETS[name], KEEP)
    losses = []
    for place in (device(), "cpu"):
        out = tmp_path / str(place)
        api.compress(MODEL, recipe=recipe, device=place, dtype=torch.float32, output=out, **QUICK)
        losses.append(loss(out, "cpu"))
    assert abs(losses[0] - losses[1]) <= GAP


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
@pytest.mark.parametrize("storage", ["factored", "packed", "auto"])
def test_every_storage_and_format_is_its_restored_matrix(storage, weights, dtype, tmp_path):
    api.compress(
        MODEL,
        recipe="svd",
        keep=KEEP,
        storage=storage,
        weights=weights,
        device=device(),
        output=tmp_path / "out",
    )
    api.export(tmp_path / "out", output=tmp_path / "dense")
    one, other = (
        load_model(tmp_path / n, RunOptions(device=device(), dtype=dtype)).model
        for n in ("out", "dense")
    )
    assert compressed_layers(one)
    for tokens in (1, 40):
        ids = windows(2, tokens).to(device())
        with torch.no_grad():
            found, expected = (m(input_ids=ids).logits.float() for m in (one, other))
        bound = 1e-3 if dtype == torch.float32 else ROUNDING
        assert (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("name", ["svd-llm", "spectrim"])
def test_out_of_core_gives_the_model_in_memory_with_the_predicted_peak(name, tmp_path):
    recipe = PRESETS[name]
    losses = []
    for lazily in (False, True):
        out = tmp_path / str(lazily)
        options = {"recipe": recipe, "device": device(), "out_of_core": lazily, **QUICK}
        predicted = sum(api.estimate(MODEL, keep=KEEP, **options).device_parts.values())
        forget_peak_memory(device())
        before = torch.cuda.memory_allocated(device())
        api.compress(MODEL, keep=KEEP, output=out, **options)
        peak = peak_memory(device())
        assert peak is not None
        assert peak - before <= 1.2 * predicted
        losses.append(loss(out, device()))
    assert abs(losses[0] - losses[1]) <= GAP
