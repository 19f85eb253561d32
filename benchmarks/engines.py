"""Factors in engines that do not know spectrim: ONNX Runtime and OpenVINO on one CPU thread.

The bundled model dense and compressed (`svd-llm` at keep 0.6, factored and packed) is exported with
`--format onnx`; each engine runs all of them in fp32 and in its own int8 and int4. Measured in one
run: bytes, CPU seconds of a prompt and of single tokens in turn, perplexity, and how far logits are
from torch's.

    pip install 'spectrim[onnx]' onnxruntime openvino nncf
    python benchmarks/engines.py --output benchmarks/results/engines_cpu.json
"""

from __future__ import annotations

import argparse
import json
import math
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
    """ONNX Runtime: fp32, its dynamic int8 with a scale per row, or int4 in blocks of 32."""
    import onnx
    import onnxruntime as ort
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    target = file if bits == "fp32" else file.with_name(f"{bits}.onnx")
    if bits == "int8":
        quantize_dynamic(file, target, per_channel=True, weight_type=QuantType.QInt8)
    elif bits == "int4":
        # Level 4: products of integers, which is what int4 is fast with on a CPU.
        rounding = MatMulNBitsQuantizer(onnx.load(file), block_size=32, accuracy_level=4)
        rounding.process()
        rounding.model.save_model_to_file(str(target))
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(target), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_outputs()]
    return lambda x: dict(zip(names, session.run(names, x), strict=True)), _size(target)


def openvino(file: Path, bits: str) -> tuple[Run, int]:
    """OpenVINO: fp32, or weights in int8 or int4 (groups of 64) as NNCF compresses them."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(file))
    if bits != "fp32":
        import nncf

        words: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
        if bits == "int4":
            # A rank is seldom a multiple of 64: such a matrix gets smaller groups, or stays int8.
            adjust = nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST,
                min_adjusted_group_size=8,
            )
            mode = nncf.CompressWeightsMode.INT4_ASYM
            words = {"mode": mode, "group_size": 64, "advanced_parameters": adjust}
        model = nncf.compress_weights(model, **words)
    target = file.with_name(f"openvino-{bits}.xml")
    ov.save_model(model, str(target), compress_to_fp16=False)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(str(target), "CPU", settings)
    names = [one.get_any_name() for one in compiled.outputs]
    size = _size(target.with_suffix(".bin"))
    return lambda x: dict(zip(names, compiled(x).values(), strict=True)), size


def _size(file: Path) -> int:
    beside = file.with_name(file.name + ".data")
    return sum(one.stat().st_size for one in (file, beside) if one.exists())


ENGINES = {"onnxruntime": runtime, "openvino": openvino}
FORMATS = ("fp32", "int8", "int4")


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


def time_in_turn(runs: list[tuple[dict[str, Any], Run, Any]], ids: np.ndarray) -> None:
    """Add CPU seconds of a prompt and of one further token to every row, the least of several.

    Rounds over all runs, so that whatever else the machine does meets all of them.
    """
    for _ in range(REPEATS):
        for row, run, config in runs:
            started = time.process_time()
            out = run({"input_ids": ids, **empty(config, 1)})
            prompt = time.process_time()
            for _ in range(TOKENS):
                out = run({"input_ids": ids[:, :1], **carried(out)})
            token = (time.process_time() - prompt) / TOKENS
            for name, seconds in (("prompt_seconds", prompt - started), ("token_seconds", token)):
                row[name] = min(row.get(name, seconds), seconds)


def nll(logits: np.ndarray, ids: np.ndarray) -> float:
    """Mean next-token loss in nats."""
    scores = torch.from_numpy(logits)[:, :-1].double().log_softmax(-1)
    return -float(scores.gather(-1, torch.from_numpy(ids)[:, 1:, None]).mean())


def rows_of(
    name: str, graph: Path, folder: Path, ids: np.ndarray
) -> list[tuple[dict[str, Any], Run, Any]]:
    """One model in every engine: what is measured once, how it runs, and its configuration."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        own = model(torch.from_numpy(ids)).logits.numpy()
    found = []
    for engine, load in ENGINES.items():
        for bits in FORMATS:
            run, size = load(graph / "model.onnx", bits)
            logits = run({"input_ids": ids, **empty(model.config, len(ids))})["logits"]
            row = {
                "model": name,
                "engine": engine,
                "weights": bits,
                "bytes": size,
                "perplexity": math.exp(nll(logits, ids)),
                "perplexity_in_torch": math.exp(nll(own, ids)),
                "largest_logit_difference": float(np.abs(logits - own).max()),
            }
            print(json.dumps(row), flush=True)
            found.append((row, run, model.config))
    return found


def main() -> None:
    """Compress, export, run, write."""
    import spectrim  # noqa: F401  # transformers loads the result

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    text = HELD_OUT.read_text(encoding="utf-8")[:200_000]
    tokens = AutoTokenizer.from_pretrained(MODEL)(text).input_ids[: WINDOWS * LENGTH]
    ids = np.array(tokens, dtype=np.int64).reshape(WINDOWS, LENGTH)
    runs: list[tuple[dict[str, Any], Run, Any]] = []
    with TemporaryDirectory() as temporary:
        place = Path(temporary)
        folders = {"dense": Path(MODEL)}
        for storage in ("factored", "packed"):
            words = {"recipe": "svd-llm", "keep": 0.6, "text": CALIBRATION, "storage": storage}
            api.compress(MODEL, output=place / f"{storage}-folder", **words)
            folders[f"svd-llm 0.6, {storage}"] = place / f"{storage}-folder"
        for number, (name, folder) in enumerate(folders.items()):
            api.export(folder, output=place / str(number), to="onnx")
            runs += rows_of(name, place / str(number), folder, ids)
        time_in_turn(runs, ids.reshape(1, -1)[:, :PROMPT])
    rows = [row for row, _, _ in runs]
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
