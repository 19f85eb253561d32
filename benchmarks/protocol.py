"""The protocol that the studies of quality share: texts, windows, one process per row, results.

128 calibration windows of 256 tokens at seeded random positions of the training text (seed 0
unless `--seeds` says otherwise); evaluation on the first 781 windows of 256 tokens of another
text, 255 predictions each, fp32. `--also-text` measures every row on a further text as well.

Every row runs in a process of its own with one thread, so that CPU seconds and peak memory are
its own. Rows are named; those that the results hold already, with the same keep, seed and number
of evaluation windows, are not run again. Token ids are kept in `--token-cache`, which makes the
texts needless from the second run on.
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import spectrim.demo
from spectrim.data.tokens import tokenize
from spectrim.evaluate.perplexity import perplexity
from spectrim.recipe import Recipe
from spectrim.run.compress import run_recipe
from spectrim.run.loading import LoadedModel, load_model
from spectrim.run.options import RunOptions

__all__ = [
    "EVALUATION",
    "FLOORS",
    "LENGTH",
    "MODEL",
    "TOKEN_CACHE",
    "Row",
    "environment",
    "evaluation_windows",
    "fill_cache",
    "main",
    "quality",
    "random_windows",
    "read_results",
    "recipe_row",
    "recipe_rows",
]

MODEL = Path(spectrim.demo.__file__).parent / "llama-books"
TOKEN_CACHE = Path(tempfile.gettempdir()) / "spectrim-books-tokens.safetensors"
LENGTH, CALIBRATION, EVALUATION = 256, 128, 781
KEEPS = (0.8, 0.6, 0.4)
FLOORS = {"fill": False}
"""The papers' ranks, floor(keep m n / (m + n)), with what rounding leaves over unspent."""

Row = Callable[[LoadedModel, Tensor, float], dict[str, Any]]
"""(loaded model, calibration windows, keep) -> facts; the model is compressed in place."""


def recipe_row(recipe: Recipe) -> Row:
    """A row that is one run of a recipe."""

    def run(loaded: LoadedModel, calibration: Tensor, keep: float) -> dict[str, Any]:
        outcome = run_recipe(
            loaded, recipe.with_changes(keep=keep), RunOptions(measure=False), text=calibration
        )
        return {
            "kept": outcome.plan.achieved_keep,
            "dense_targets": sum(e.rank is None for e in outcome.plan.entries),
            "recipe_hash": outcome.recipe.hash(),
            "seconds": {k: round(v, 1) for k, v in outcome.report["seconds"].items()},
            "notes": outcome.report["notes"],
        }

    return run


def recipe_rows(recipes: Mapping[str, Recipe]) -> dict[str, Row]:
    """Rows by name."""
    return {name: recipe_row(recipe) for name, recipe in recipes.items()}


def fill_cache(cache: Path, model: Path, **texts: Path | None) -> None:
    """Tokenise the texts `train`, `eval` and perhaps `also`, unless an earlier run has done so."""
    if cache.exists():
        return
    if texts["train"] is None or texts["eval"] is None:
        sys.exit(f"no token cache at {cache}: give --train-text and --eval-text")
    tokenizer = load_model(model).tokenizer
    given = {key: path for key, path in texts.items() if path is not None}
    save_file({k: tokenize(_read(path), tokenizer).int() for k, path in given.items()}, cache)


def _read(path: Path) -> str:
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read()
    return path.read_text(encoding="utf-8")


def random_windows(cache: Path, *, seed: int = 0, count: int = CALIBRATION) -> Tensor:
    """Windows at random positions of the training text, (count, 256); the text stays on disk."""
    with safe_open(cache, framework="pt") as ids:
        train = ids.get_slice("train")
        last = train.get_shape()[0] - LENGTH - 1
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, last, (count,), generator=generator).tolist()
        return torch.stack([train[i : i + LENGTH] for i in starts]).long()


def evaluation_windows(cache: Path, count: int, *, text: str = "eval") -> Tensor | None:
    """The first windows of a text, (at most count, 256); None where the cache lacks it."""
    with safe_open(cache, framework="pt") as ids:
        if text not in ids.keys():  # noqa: SIM118 - not a mapping
            return None
        held = ids.get_slice(text)
        count = min(count, held.get_shape()[0] // LENGTH)
        return held[: count * LENGTH].view(count, LENGTH).long()


def quality(model: nn.Module, windows: Tensor) -> dict[str, float]:
    """Loss of a model, evaluated in fp32."""
    result = perplexity(model.float(), windows, batch=16)
    return {
        "nll": result.nll,
        "perplexity": result.perplexity,
        "nll_standard_error": result.nll_standard_error,
    }


def _evaluate(model: nn.Module, cache: Path, count: int) -> dict[str, float]:
    """Losses on the evaluation text, and on the further one where there is one."""
    windows = evaluation_windows(cache, count)
    assert windows is not None
    found = quality(model, windows)
    also = evaluation_windows(cache, count, text="also")
    if also is not None:
        found |= {f"also_{key}": value for key, value in quality(model, also).items()}
    return found


def _run(row: Row | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress and evaluate in this process."""
    torch.set_num_threads(1)
    loaded = load_model(arguments.model)
    facts: dict[str, Any] = {}
    if row is not None:
        calibration = random_windows(arguments.token_cache, seed=arguments.seeds[0])
        started = time.process_time()
        facts = row(loaded, calibration, arguments.keeps[0])
        facts.setdefault("cpu_seconds", round(time.process_time() - started, 1))
        facts["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        loaded.model.to(loaded.stored_dtype)
    if facts.get("measured", True):
        facts |= _evaluate(loaded.model, arguments.token_cache, arguments.eval_windows)
    return facts


def environment() -> dict[str, str]:
    """Hardware, versions and precision of a study's rows."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": _processor(),
        "threads": "1",
        "dtype": "float32, stored in bfloat16",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def read_results(path: Path) -> list[dict[str, Any]]:
    """The rows measured so far."""
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def _key(row: Mapping[str, Any]) -> tuple:
    return (row["row"], row["keep"], row.get("seed", 0), row["eval_windows"])


def _measure(wanted: Sequence[tuple[str, float, int]], arguments: argparse.Namespace) -> None:
    """Run what is missing, one process per row, and write the results after each."""
    texts = {"train": arguments.train_text, "eval": arguments.eval_text}
    fill_cache(arguments.token_cache, arguments.model, **texts, also=arguments.also_text)
    windows = arguments.eval_windows
    for name, keep, seed in wanted:
        known = read_results(arguments.output)
        row: dict[str, Any] = {"row": name, "keep": keep, "seed": seed, "eval_windows": windows}
        if _key(row) in {_key(r) for r in known}:
            continue
        command = [sys.executable, sys.argv[0], "--row", name, "--keeps", str(keep)]
        command += ["--seeds", str(seed), "--eval-windows", str(windows)]
        command += ["--model", str(arguments.model), "--token-cache", str(arguments.token_cache)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        known.append(row | json.loads(done.stdout.splitlines()[-1]))
        content = {"environment": environment(), "rows": known}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        show(known, windows)


def show(known: list[dict[str, Any]], windows: int) -> None:
    """A Markdown table of all rows with as many evaluation windows."""
    chosen = [r for r in known if r["eval_windows"] == windows and "nll" in r]
    dense = next((r for r in chosen if r["row"] == "dense"), {})
    also = any("also_nll" in r for r in chosen)
    print(f"dense: {dense.get('nll', float('nan')):.4f} nats, {windows} windows\n")
    print(f"| keep | row | seed | kept | perplexity | gap |{' other gap |' * also} CPU s | MiB |")
    print(f"|---|---|---|---|---|---|{'---|' * also}---|---|")
    compressed = (r for r in chosen if r["row"] != "dense")
    for r in sorted(compressed, key=lambda r: (-r["keep"], r["nll"])):
        other = f" {r['also_nll'] - dense['also_nll']:.4f} |" if "also_nll" in r else " |" * also
        print(
            f"| {r['keep']} | {r['row']} | {r.get('seed', 0)} | {r['kept']:.4f} "
            f"| {r['perplexity']:.2f} | {r['nll'] - dense['nll']:.4f} |{other} "
            f"{r['cpu_seconds']:.0f} | {r['peak_rss_mib']} |"
        )


def main(
    rows: Mapping[str, Row],
    *,
    results: Path,
    description: str | None,
    first: Mapping[str, Row] | None = None,
) -> None:
    """The command line of a study.

    Args:
        rows: by name.
        results: where the rows are collected.
        description: of the study.
        first: rows without a keep that run before the others, whatever `--only` says.
    """
    first = first or {}
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--train-text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--also-text", type=Path, help="a further text of another domain")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--token-cache", type=Path, default=TOKEN_CACHE)
    parser.add_argument("--output", type=Path, default=results)
    parser.add_argument("--only", default="", metavar="REGEX", help="rows whose name matches")
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--eval-windows", type=int, default=EVALUATION)
    parser.add_argument("--show", action="store_true", help="print the results and run nothing")
    parser.add_argument("--row", help="run one row in this process and print it as JSON")
    arguments = parser.parse_args()
    if arguments.show:
        show(read_results(arguments.output), arguments.eval_windows)
    elif arguments.row is not None:
        row = {**rows, **first}[arguments.row] if arguments.row != "dense" else None
        print(json.dumps(_run(row, arguments)))
    else:
        chosen = [name for name in rows if re.search(arguments.only, name)]
        wanted = [("dense", 1.0, 0), *((name, 1.0, 0) for name in first)]
        wanted += [(n, k, s) for n in chosen for k in arguments.keeps for s in arguments.seeds]
        _measure(wanted, arguments)
