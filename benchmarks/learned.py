"""Learned spectra on the bundled model: ACIP's curve from one run, SoCo with its parts taken out.

    python benchmarks/learned.py --train-text books_train.txt.gz --eval-text books_eval.txt
    python benchmarks/learned.py ... --only '^soco'
    python benchmarks/learned.py --show

Protocol and token cache are those of protocol.py.

One ACIP training gives every keep. It stands beside zs-svd (one-shot) and svd-llm, decided anew for
every keep, and beside the one-pass Fisher order of the same components, cut without training, and
healed like ACIP's. SoCo is trained once per keep, at 0.4 also with only one of its effects.

Every run has a process of its own, one thread; a run whose rows are all there, made by the same
recipe on as many evaluation windows, is not repeated. The recipes' own hyper-parameters are for 7B
models; those below are for this size of model and were chosen on other windows of the training text
(`--held-out`), never on the evaluation text.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from protocol import (
    EVALUATION,
    LENGTH,
    MODEL,
    TOKEN_CACHE,
    environment,
    evaluation_windows,
    fill_cache,
    quality,
    random_windows,
    read_results,
)
from torch import Tensor, nn

from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe
from spectrim.run.compress import run_recipe
from spectrim.run.learned.elastic import ElasticModel
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions

RESULTS = Path(__file__).parent / "results" / "learned.json"
CURVE = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
SOCO_KEEPS = (0.8, 0.6, 0.4)
HELD_OUT_SEED, HELD_OUT = 12345, 96

ACIP: dict[str, Any] = {
    "stop_keep": 0.3,
    "batch": 2,
    "learning_rate": 4e-4,
    "lora_rank": 2,
    "lora_alpha": 4,
    "lora_dropout": 0.0,
    "lora_learning_rate": 5e-4,
    "clip": 1.0,
    "steps": 200,
    "max_steps": 320,
    "pressure_growth": 1.03,
    "pressure_every": 1,
    "size_every": 2,
    "heal_steps": 160,
    "heal_learning_rate": 1e-3,
    "heal_parts": "factors",
    "heal_factor_learning_rate": 1e-4,
    "heal_grid": 16,
}
SOCO: dict[str, Any] = {
    "batch": 2,
    "learning_rate": 0.03,
    "warmup_steps": 5,
    "explore_steps": 60,
    "oscillate_steps": 30,
    "sparsify_steps": 40,
    "recover_steps": 60,
    "recover_learning_rate": 0.02,
    "pressure_growth": 1.03,
    "dead_after": 8,
    "sensitivity_steps": 24,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "fisher order, cut": {"order": "fisher", "lora_rank": 0, "heal_steps": 0},
    "fisher order, healed": {"order": "fisher"},
    "acip as published": {
        "objective": "plain",
        "gate_dtype": "bfloat16",
        "weigh_by_cost": False,
        "heal_parts": "corrections",
        "heal_sizes": "stop",
        "heal_objective": "cross_entropy",
        "heal_final_learning_rate": 1.0,
    },
    "acip, corrections only healed": {"heal_parts": "corrections"},
}
"""What is changed in ACIP's recipe for the rows beside it."""


@dataclass(frozen=True)
class Run:
    """One process: a recipe and the sizes that its result is measured at.

    Attributes:
        recipe: with the keep that it is carried out at.
        keeps: of the rows; several where the result is an elastic artifact.
    """

    recipe: Recipe
    keeps: tuple[float, ...]


def runs() -> dict[str, Run]:
    """Every run by the name of its rows; a name may end in ` @keep`, which is not part of it."""
    found: dict[str, Run] = {}

    def single(name: str, keeps: tuple[float, ...], recipe: Recipe) -> None:
        for keep in keeps:
            found[f"{name} @{keep}"] = Run(recipe.with_changes(keep=keep), (keep,))

    acip = get_recipe("acip").with_changes(keep=ACIP["stop_keep"], learn=ACIP)
    soco = get_recipe("soco").with_changes(learn=SOCO)
    found["acip"] = Run(acip, CURVE)
    single("soco", SOCO_KEEPS, soco)
    for part in ("selection", "rescaling", "allocation"):
        single(f"soco, {part} only", (0.4,), soco.with_changes(learn={"parts": part}))
    for name, learn in VARIANTS.items():
        changes = {k: v for k, v in learn.items() if k != "objective"}
        chosen = acip.with_changes(learn=changes)
        if "objective" in learn:
            chosen = chosen.with_changes(decompose={"objective": learn["objective"]})
        found[name] = Run(chosen, CURVE)
    one_shot = [{"step": "projected_gradient", "stages": 1}]
    single("zs-svd one-shot", CURVE, get_recipe("zs-svd").with_changes(refine=one_shot))
    single("svd-llm", CURVE, get_recipe("svd-llm"))
    return found


def measured_windows(arguments: argparse.Namespace) -> Tensor:
    """The windows to measure on."""
    if arguments.held_out:
        return random_windows(arguments.token_cache, seed=HELD_OUT_SEED, count=HELD_OUT)
    windows = evaluation_windows(arguments.token_cache, arguments.eval_windows)
    assert windows is not None
    return windows


def rows_of(name: str, run: Run, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Compress once in this process, measure at every size."""
    torch.set_num_threads(1)
    calibration = random_windows(arguments.token_cache)
    evaluation = measured_windows(arguments)
    loaded = load_model(MODEL)
    started = time.process_time()
    outcome = run_recipe(loaded, run.recipe, RunOptions(measure=False), text=calibration)
    facts = {
        "cpu_seconds": round(time.process_time() - started, 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "recipe_hash": outcome.recipe.hash(),
        "seconds": {k: round(v, 1) for k, v in outcome.report["seconds"].items()},
        "notes": outcome.report["notes"],
    }
    elastic = None
    if outcome.elastic is not None:
        elastic = ElasticModel(load_model(MODEL), outcome.elastic)
    for keep in run.keeps:
        model: nn.Module = outcome.model if elastic is None else elastic.model
        plan = outcome.plan if elastic is None else elastic.resize(keep)
        row = {"row": name.partition(" @")[0], "keep": keep, "kept": plan.achieved_keep}
        yield {**row, **facts, **quality(model, evaluation), "eval_windows": len(evaluation)}


def dense_row(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all gaps are measured against."""
    torch.set_num_threads(1)
    windows = measured_windows(arguments)
    row = {"row": "dense", "keep": 1.0, "kept": 1.0, "eval_windows": len(windows)}
    return row | quality(load_model(MODEL).model, windows)


def is_known(name: str, run: Run, known: list[dict[str, Any]], windows: int) -> bool:
    """Whether all rows of a run are there, made by this recipe."""
    wanted = (name.partition(" @")[0], run.recipe.hash(), windows)
    made = {
        r["keep"] for r in known if (r["row"], r.get("recipe_hash"), r["eval_windows"]) == wanted
    }
    return set(run.keeps) <= made


def measure(table: dict[str, Run], arguments: argparse.Namespace) -> None:
    """Carry out what is missing, one process per run, and write the results after every row."""
    texts = {"train": arguments.train_text, "eval": arguments.eval_text}
    fill_cache(arguments.token_cache, MODEL, **texts)
    windows = HELD_OUT if arguments.held_out else arguments.eval_windows
    wanted = ["dense", *(n for n in table if re.search(arguments.only, n))]
    for name in wanted:
        known = read_results(arguments.output)
        if name == "dense":
            done = any(r["row"] == "dense" and r["eval_windows"] == windows for r in known)
        else:
            done = is_known(name, table[name], known, windows)
        if done:
            continue
        command = [sys.executable, __file__, "--row", name]
        command += ["--token-cache", str(arguments.token_cache)]
        command += ["--eval-windows", str(arguments.eval_windows)]
        command += ["--held-out"] * arguments.held_out
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    write_row(json.loads(line), arguments.output, table)
        if process.returncode != 0:
            sys.exit(f"{name} ended with code {process.returncode}")
        show(read_results(arguments.output), windows)


def write_row(row: dict[str, Any], output: Path, table: dict[str, Run]) -> None:
    """Replace the row of this name and size; several runs may write one after the other."""
    key = ("row", "keep", "eval_windows")
    others = [r for r in read_results(output) if [r[k] for k in key] != [row[k] for k in key]]
    content = {
        "environment": environment(),
        "protocol": {
            "calibration": "128 windows of 256 tokens, seed 0",
            "evaluation_length": LENGTH,
        },
        "settings": {"acip": ACIP, "soco": SOCO, "variants": VARIANTS},
        "rows": sorted([*others, row], key=lambda r: (r["row"], -r["keep"])),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(known: list[dict[str, Any]], windows: int) -> None:
    """A Markdown table of gaps, one line per method."""
    chosen = [r for r in known if r["eval_windows"] == windows]
    dense = next((r["nll"] for r in chosen if r["row"] == "dense"), float("nan"))
    print(f"dense: {dense:.4f} nats, {windows} windows; gaps in nats per token\n")
    print("| row | " + " | ".join(f"{k}" for k in CURVE) + " | CPU s |\n" + "|---" * 9 + "|")
    for name in dict.fromkeys(r["row"] for r in chosen if r["row"] != "dense"):
        rows = {r["keep"]: r for r in chosen if r["row"] == name}
        gaps = [f"{rows[k]['nll'] - dense:.4f}" if k in rows else "" for k in CURVE]
        cpu = max(r["cpu_seconds"] for r in rows.values())
        print(f"| {name} | " + " | ".join(gaps) + f" | {cpu:.0f} |")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train-text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--token-cache", type=Path, default=TOKEN_CACHE)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", default="", metavar="REGEX", help="runs whose name matches")
    parser.add_argument("--eval-windows", type=int, default=EVALUATION)
    parser.add_argument("--held-out", action="store_true", help="measure on training text instead")
    parser.add_argument("--show", action="store_true", help="print the results and run nothing")
    parser.add_argument("--row", help="carry out one run in this process and print its rows")
    arguments = parser.parse_args()
    table = runs()
    if arguments.show:
        show(read_results(arguments.output), arguments.eval_windows)
    elif arguments.row == "dense":
        print(json.dumps(dense_row(arguments)))
    elif arguments.row is not None:
        for row in rows_of(arguments.row, table[arguments.row], arguments):
            print(json.dumps(row), flush=True)
    else:
        measure(table, arguments)


if __name__ == "__main__":
    main()
