"""Peak memory where the vocabulary is most of a model: Gemma-3-270M's shape with random weights.

    python benchmarks/large_vocabulary.py

The default recipe at keep 0.8 with the windows that it chooses itself (`--windows 256x2048` for
others), on random token ids: only memory and time mean something here. One process, one thread;
memory is the largest resident anonymous memory until the result is there, beside what `--dry-run`
says. The result is written to `results/large_vocabulary.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from protocol import environment, read_results
from real_llm import peak_memory
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from spectrim import api
from spectrim.run.compress import run_recipe
from spectrim.run.cost import settled
from spectrim.run.footprint import read_sizes
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions

RESULTS = Path(__file__).parent / "results" / "large_vocabulary.json"
SHAPE = Gemma3TextConfig(
    vocab_size=262144,
    hidden_size=640,
    intermediate_size=2048,
    num_hidden_layers=18,
    num_attention_heads=4,
    num_key_value_heads=1,
    head_dim=256,
    max_position_embeddings=32768,
    tie_word_embeddings=True,
)


def measured(folder: Path, windows: str | None) -> dict:
    """One run: what it needed and what was predicted."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPE, dtype=torch.bfloat16).save_pretrained(folder)
    recipe = api.resolve_recipe("spectrim", keep=0.8)
    found = settled(recipe, read_sizes(SHAPE, False), torch.device("cpu"), 32768)
    count, length = found.windows, found.window_length
    if windows is not None:
        count, length = map(int, windows.split("x"))
    predicted = api.estimate(folder, recipe=recipe, windows=count, window_length=length)
    ids = torch.randint(0, SHAPE.vocab_size, (count, length))
    with peak_memory() as memory:
        loaded = load_model(folder)
        started = time.process_time()
        outcome = run_recipe(loaded, recipe, RunOptions(measure=False), text=ids)
        seconds = time.process_time() - started
    return {
        "windows": f"{count}x{length}",
        "reason": found.reason if windows is None else "asked for",
        "kept": outcome.plan.achieved_keep,
        "peak_bytes": memory["bytes"],
        "predicted_bytes": predicted.host_bytes,
        "cpu_seconds": round(seconds, 1),
        "stages": {k: round(v, 1) for k, v in outcome.report["seconds"].items()},
        "passes": outcome.report["environment"]["passes"],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", metavar="WINDOWSxTOKENS")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = read_results(arguments.output)
    with tempfile.TemporaryDirectory() as folder:
        rows.append(measured(Path(folder), arguments.windows))
    content = {
        "environment": environment(),
        "protocol": " ".join((__doc__ or "").partition("    python")[2].split()[1:]),
        "rows": rows,
    }
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(rows[-1]))


if __name__ == "__main__":
    main()
