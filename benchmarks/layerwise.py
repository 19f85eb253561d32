"""Layer-wise recipes on the bundled model: objectives 1 to 4, refined or not, and the baselines.

    python benchmarks/layerwise.py --train-text books_train.txt.gz --eval-text books_eval.txt
    python benchmarks/layerwise.py ... --only 'objective 4' --keeps 0.6
    python benchmarks/layerwise.py --show

Protocol: 128 calibration windows of 256 tokens at seeded random positions of the training text;
evaluation on the first 781 windows of 256 tokens of the other text, 255 predictions each, fp32.
Ranks are the papers' floor(keep m n / (m + n)), the same for every row except the searched ones;
refinement has the published hyper-parameters with batch 16, so that a block gets 175 steps.

Every row runs in a process of its own, one thread, so that CPU seconds and peak memory are its
own; rows that are in the results already, with as many evaluation windows, are not run again.
Token ids are kept in `--token-cache`, which makes the texts needless from the second run on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import spectrim.demo
from spectrim.data.tokens import tokenize
from spectrim.evaluate.perplexity import perplexity
from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe
from spectrim.run.compress import run_recipe
from spectrim.run.loading import load_model

MODEL = Path(spectrim.demo.__file__).parent / "llama-books"
RESULTS = Path(__file__).parent / "results" / "layerwise.json"
TOKEN_CACHE = Path(tempfile.gettempdir()) / "spectrim-books-tokens.safetensors"
LENGTH, CALIBRATION, EVALUATION = 256, 128, 781
KEEPS = (0.8, 0.6, 0.4)
OBJECTIVES = {1: "plain", 2: "whitened", 3: "shifted", 4: "anchored"}
BLOCK = {"step": "block", "batch": 16}
FLOORS = {"fill": False}


def rows() -> dict[str, Recipe]:
    """Every row of the table by name."""
    found = {}
    for number, objective in OBJECTIVES.items():
        for label, refine in (("", []), (" refined", [BLOCK])):
            found[f"objective {number}{label}"] = get_recipe("aa-svd").with_changes(
                decompose={"objective": objective}, allocate=FLOORS, refine=refine
            )
    for name in ("fwsvd", "asvd", "svd-llm", "svd-llm-update", "svd-llm-v2"):
        found[name] = get_recipe(name).with_changes(allocate=FLOORS)
    return found


def fill_cache(arguments: argparse.Namespace) -> None:
    """Tokenise both texts, unless an earlier run has done so."""
    cache = arguments.token_cache
    if cache.exists():
        return
    if arguments.train_text is None or arguments.eval_text is None:
        sys.exit(f"no token cache at {cache}: give --train-text and --eval-text")
    tokenizer = load_model(MODEL).tokenizer
    texts = {"train": arguments.train_text, "eval": arguments.eval_text}
    save_file({k: tokenize(_read(path), tokenizer).int() for k, path in texts.items()}, cache)


def _read(path: Path) -> str:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def read_windows(cache: Path, windows: int) -> tuple[Tensor, Tensor]:
    """Calibration and evaluation windows; the texts themselves stay on disk."""
    with safe_open(cache, framework="pt") as ids:
        train, held = ids.get_slice("train"), ids.get_slice("eval")
        last = train.get_shape()[0] - LENGTH - 1
        generator = torch.Generator().manual_seed(0)
        starts = torch.randint(0, last, (CALIBRATION,), generator=generator).tolist()
        calibration = torch.stack([train[i : i + LENGTH] for i in starts])
        evaluation = held[: windows * LENGTH].view(windows, LENGTH)
    return calibration.long(), evaluation.long()


def run_row(
    table: dict[str, Recipe], name: str, keep: float, cache: Path, windows: int
) -> dict[str, Any]:
    """Compress and evaluate in this process."""
    torch.set_num_threads(1)
    loaded = load_model(MODEL)
    calibration, evaluation = read_windows(cache, windows)
    facts: dict[str, Any] = {"row": name, "keep": keep, "eval_windows": windows}
    if name != "dense":
        recipe = table[name].with_changes(keep=keep)
        started = time.process_time()
        outcome = run_recipe(loaded, recipe, text=calibration)
        facts["cpu_seconds"] = round(time.process_time() - started, 1)
        facts["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        facts["kept"] = outcome.plan.achieved_keep
        facts["recipe_hash"] = outcome.recipe.hash()
        facts["seconds"] = {k: round(v, 1) for k, v in outcome.report["seconds"].items()}
        facts["notes"] = outcome.report["notes"]
    result = perplexity(loaded.model.float(), evaluation, batch=16)
    return {
        **facts,
        "nll": result.nll,
        "perplexity": result.perplexity,
        "nll_standard_error": result.nll_standard_error,
    }


def measure(table: dict[str, Recipe], script: str, arguments: argparse.Namespace) -> None:
    """Run what is missing, one process per row, and write the results after each."""
    fill_cache(arguments)
    wanted = [("dense", 1.0)]
    wanted += [(n, k) for n in table for k in arguments.keeps if re.search(arguments.only, n)]
    for name, keep in wanted:
        known = read_results(arguments.output)
        windows = arguments.eval_windows
        if any((r["row"], r["keep"], r["eval_windows"]) == (name, keep, windows) for r in known):
            continue
        command = [sys.executable, script, "--row", name, "--keeps", str(keep)]
        command += ["--token-cache", str(arguments.token_cache), "--eval-windows", str(windows)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        known.append(json.loads(done.stdout.splitlines()[-1]))
        content = {"environment": environment(), "rows": known}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        show(known, windows)


def environment() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": "1",
        "dtype": "float32, stored in bfloat16",
    }


def read_results(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def show(known: list[dict[str, Any]], windows: int) -> None:
    """A Markdown table of all rows with as many evaluation windows."""
    chosen = [r for r in known if r["eval_windows"] == windows]
    dense = next((r["nll"] for r in chosen if r["row"] == "dense"), float("nan"))
    print(f"dense: {dense:.4f} nats, {windows} windows\n")
    print(
        "| keep | row | kept | perplexity | gap | CPU s | peak MiB |\n|---|---|---|---|---|---|---|"
    )
    compressed = (r for r in chosen if r["row"] != "dense")
    for r in sorted(compressed, key=lambda r: (-r["keep"], r["nll"])):
        print(
            f"| {r['keep']} | {r['row']} | {r['kept']:.4f} | {r['perplexity']:.2f} "
            f"| {r['nll'] - dense:.4f} | {r['cpu_seconds']:.0f} | {r['peak_rss_mib']} |"
        )


def main(table: dict[str, Recipe], *, script: str, results: Path, description: str | None) -> None:
    """The command line of a study: rows by name on the protocol above.

    Args:
        table: row name -> recipe, without keep.
        script: the study's own file, run again for every row.
        results: where the rows are collected.
        description: of the study.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--train-text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--token-cache", type=Path, default=TOKEN_CACHE)
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--eval-windows", type=int, default=EVALUATION)
    parser.add_argument("--show", action="store_true", help="print the results and run nothing")
    parser.add_argument("--row", help="run one row in this process and print it as JSON")
    arguments = parser.parse_args()
    if arguments.show:
        show(read_results(arguments.output), arguments.eval_windows)
    elif arguments.row is not None:
        keep, cache = arguments.keeps[0], arguments.token_cache
        print(json.dumps(run_row(table, arguments.row, keep, cache, arguments.eval_windows)))
    else:
        measure(table, script, arguments)


if __name__ == "__main__":
    main(rows(), script=__file__, results=RESULTS, description=__doc__)
