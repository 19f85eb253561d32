"""Factors in engines that do not know spectrim: ONNX Runtime and OpenVINO on one CPU thread.

The bundled model dense and compressed (`svd-llm` at keep 0.6) is exported with `--format onnx`;
each engine runs both in fp32 and in its own int8. Measured in one run: bytes, CPU seconds of a
prompt and of single tokens, perplexity, and how far logits are from torch's.

    pip install 'spectrim[onnx]' onnxruntime openvino nncf
    python benchmarks/engines.py --output benchmarks/results/engines_cpu.json
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from spectrim import api
from spectrim.demo.run import CALIBRATION, HELD_OUT, MODEL

PROMPT, TOKENS, REPEATS = 512, 32, 3
WINDOWS, LENGTH = 16, 256

Run = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def runtime(file: Path, bits: str) -> tuple[Run, int]:
    """ONNX Runtime: fp32, or its dynamic int8 with a scale per row."""
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic

    if bits == "int8":
        target = file.with_name("int8.onnx")
        if not target.exists():
            quantize_dynamic(file, target, per_channel=True, weight_type=QuantType.QInt8)
        file = target
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return lambda x: dict(zip(names, session.run(names, x), strict=True)), file.stat().st_size


def openvino(file: Path, bits: str) -> tuple[Run, int]:
    """OpenVINO: fp32, or weights in int8 as NNCF compresses them."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(file))
    if bits == "int8":
        import nncf

        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    target = file.with_name(f"openvino-{bits}.xml")
    ov.save_model(model, str(target), compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(str(target), "CPU", settings)
    names = [one.get_any_name() for one in compiled.outputs]
    size = target.with_suffix(".bin").stat().st_size
    return lambda x: dict(zip(names, compiled(x).values(), strict=True)), size


ENGINES = {"onnxruntime": runtime, "openvino": openvino}


def empty(config: Any, windows: int) -> dict[str, np.ndarray]:
    """No keys and values yet."""
    size = config.hidden_size // config.num_attention_heads
    none = np.zeros((windows, config.num_key_value_heads, 0, size), dtype=np.float32)
    parts = [f"{i}.{part}" for i in range(config.num_hidden_layers) for part in ("key", "value")]
    return {f"past_key_values.{part}": none for part in parts}


def carried(out: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Keys and values for the next call."""
    return {
        name.replace("present", "past_key_values"): value
        for name, value in out.items()
        if name != "logits"
    }


def timed(run: Run, config: Any, ids: np.ndarray) -> dict[str, float]:
    """CPU seconds of a prompt and of one further token, the least of several."""
    prompts, tokens = [], []
    for _ in range(REPEATS):
        started = time.process_time()
        out = run({"input_ids": ids, **empty(config, 1)})
        prompts.append(time.process_time() - started)
        started = time.process_time()
        for _ in range(TOKENS):
            out = run({"input_ids": ids[:, :1], **carried(out)})
        tokens.append((time.process_time() - started) / TOKENS)
    return {"prompt_seconds": min(prompts), "token_seconds": min(tokens)}


def nll(logits: np.ndarray, ids: np.ndarray) -> float:
    """Mean next-token loss in nats."""
    scores = torch.from_numpy(logits)[:, :-1].double().log_softmax(-1)
    return -float(scores.gather(-1, torch.from_numpy(ids)[:, 1:, None]).mean())


def rows_of(name: str, graph: Path, folder: Path, ids: np.ndarray) -> list[dict[str, Any]]:
    """One model in every engine."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        own = model(torch.from_numpy(ids)).logits.numpy()
    prompt = np.tile(ids.reshape(1, -1), (1, 1))[:, :PROMPT]
    found = []
    for engine, load in ENGINES.items():
        for bits in ("fp32", "int8"):
            run, size = load(graph / "model.onnx", bits)
            logits = run({"input_ids": ids, **empty(model.config, len(ids))})["logits"]
            row = {
                "model": name,
                "engine": engine,
                "weights": bits,
                "bytes": size,
                "nll": nll(logits, ids),
                "nll_in_torch": nll(own, ids),
                "largest_logit_difference": float(np.abs(logits - own).max()),
                **timed(run, model.config, prompt),
            }
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


def main() -> None:
    """Compress, export, run, write."""
    import spectrim  # noqa: F401  # transformers loads the result

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--compressed", type=Path, help="a folder made before, factored, keep 0.6")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    text = HELD_OUT.read_text(encoding="utf-8")[:200_000]
    tokens = AutoTokenizer.from_pretrained(MODEL)(text).input_ids[: WINDOWS * LENGTH]
    ids = np.array(tokens, dtype=np.int64).reshape(WINDOWS, LENGTH)
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as temporary:
        place = Path(temporary)
        small = asked.compressed
        if small is None:
            small = place / "small"
            api.compress(MODEL, recipe="svd-llm", keep=0.6, text=CALIBRATION, output=small)
        for name, folder in (("dense", Path(MODEL)), ("svd-llm 0.6, factored", small)):
            api.export(folder, output=place / name, to="onnx")
            rows += rows_of(name, place / name, folder, ids)
    packages = ("onnxruntime", "openvino", "nncf", "onnx", "onnxscript", "torch", "transformers")
    record = {
        "what": "the bundled model in engines without spectrim, one CPU thread, fp32 arithmetic",
        "processor": platform.processor() or platform.machine(),
        "versions": {one: version(one) for one in packages},
        "prompt_tokens": PROMPT,
        "windows": [WINDOWS, LENGTH],
        "rows": rows,
    }
    asked.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
