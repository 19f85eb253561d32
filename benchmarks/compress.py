"""Seconds per stage and peak memory of compressing, for the bundled model and for one big block.

    python benchmarks/compress.py [--recipes svd-llm,aa-svd] [--shapes bundled,llama-7b]

Every row runs in a process of its own, so that its peak memory is its own. The big shapes are one
randomly initialised decoder block between small embeddings, calibrated on random tokens: they
measure time and memory, not quality. Results go to benchmarks/results/compress.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "compress.json"

SHAPES = {
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}


def _model(shape: str):
    """A model and its calibration windows (N, T)."""
    import torch

    from spectrim.demo.run import CALIBRATION, MODEL

    if shape == "bundled":
        return str(MODEL), CALIBRATION
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, num_hidden_layers=1, max_position_embeddings=2048, **SHAPES[shape]
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    return model, torch.randint(0, 1024, (16, 512), generator=generator)


def run_row(shape: str, recipe: str, keep: float) -> dict:
    """One compression in this process."""
    import torch

    from spectrim import api
    from spectrim.run.reporting import environment

    model, text = _model(shape)
    wall, cpu = time.perf_counter(), time.process_time()
    result = api.compress(
        model, recipe=recipe, keep=keep, text=text, windows=128, window_length=256
    )
    report = result.report
    return {
        "shape": shape,
        "recipe": recipe,
        "keep": keep,
        "kept": report["keep"]["achieved"],
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "stages": report["seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def _measured(shape: str, recipe: str, keep: float) -> dict:
    command = [sys.executable, __file__, "--row", shape, recipe, str(keep)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure what was asked for and merge it into the committed results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", default="svd,svd-llm,aa-svd,zs-svd,spectrim")
    parser.add_argument("--shapes", default="bundled,llama-3.2-1b,llama-7b")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--row", nargs=3, metavar=("SHAPE", "RECIPE", "KEEP"))
    arguments = parser.parse_args()
    if arguments.row:
        shape, recipe, keep = arguments.row
        print(json.dumps(run_row(shape, recipe, float(keep))))
        return
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    for shape in arguments.shapes.split(","):
        for recipe in arguments.recipes.split(","):
            row = _measured(shape, recipe, arguments.keep)
            key = ("shape", "recipe", "keep")
            rows = [r for r in rows if any(r[k] != row[k] for k in key)] + [row]
            RESULTS.write_text(json.dumps({"rows": rows}, indent=2) + "\n")
            peak = row["peak_memory_bytes"] / 2**20
            print(
                f"{shape:14} {recipe:18} {row['seconds']:8.1f} s wall, "
                f"{row['cpu_seconds']:8.1f} s CPU, {peak:8.0f} MiB peak",
                flush=True,
            )


if __name__ == "__main__":
    main()
