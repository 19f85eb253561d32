"""Zero-shot accuracy of the bundled model, dense and compressed, on local data without a network.

    python benchmarks/zero_shot.py DATA --calibration books_train.txt.gz [--limit 300]

DATA holds `blimp/*.jsonl` (minimal pairs with `sentence_good` and `sentence_bad`) and `piqa/` with
`valid.jsonl` and `valid-labels.lst`, as their authors publish them; nothing of it is copied but
into a temporary folder of lm-eval task files. Every recipe is calibrated on the same windows and
measured as it would be stored. Rows go to benchmarks/results/zero_shot.json as they come; those
that are there for the same protocol are not run again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spectrim.data import calibration_windows, read_text
from spectrim.demo.run import CALIBRATION, MODEL
from spectrim.evaluate.zero_shot import zero_shot
from spectrim.recipes import get_recipe
from spectrim.run.compress import run_recipe
from spectrim.run.loading import LoadedModel, load_model
from spectrim.run.options import RunOptions
from spectrim.run.reporting import environment

RESULTS = Path(__file__).parent / "results" / "zero_shot.json"
RECIPES = ("svd", "svd-llm", "spectrim")
WINDOWS, LENGTH, SEED = 128, 256, 0

BLIMP = """task: blimp_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[sentence_good, sentence_bad]}}}}"
num_fewshot: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
PIQA = """task: piqa
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {path}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
num_fewshot: 0
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def write_tasks(data: Path, folder: Path) -> dict[str, str]:
    """Task files for everything in `data`; returns task -> SHA-256 of its data."""
    hashes = {}
    for path in sorted((data / "blimp").glob("*.jsonl")):
        name = f"blimp_{path.stem}"
        task = BLIMP.format(name=path.stem, path=json.dumps(str(path)))
        (folder / f"{name}.yaml").write_text(task)
        hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    questions, labels = data / "piqa" / "valid.jsonl", data / "piqa" / "valid-labels.lst"
    if questions.is_file() and labels.is_file():
        rows = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
        answers = labels.read_text(encoding="utf-8").split()
        joined = folder / "piqa.jsonl"
        with joined.open("w", encoding="utf-8") as file:
            for row, label in zip(rows, answers, strict=True):
                file.write(json.dumps({**row, "label": int(label)}) + "\n")
        (folder / "piqa.yaml").write_text(PIQA.format(path=json.dumps(str(joined))))
        hashes["piqa"] = hashlib.sha256(joined.read_bytes()).hexdigest()
    return hashes


def compressed(dense: LoadedModel, name: str, keep: float, windows: torch.Tensor) -> Any:
    """A copy, rounded as it is stored and measured in fp32."""
    recipe = get_recipe(name).with_changes(keep=keep, seed=SEED)
    twin = replace(dense, model=copy.deepcopy(dense.model))
    outcome = run_recipe(twin, recipe, RunOptions(measure=False), text=windows)
    return outcome.model.float(), outcome.plan.achieved_keep


def measure(
    dense: LoadedModel, name: str, windows: torch.Tensor, tasks: list[str], options: dict[str, Any]
) -> dict[str, Any]:
    """One row: the dense model, or a recipe at the keep asked for."""
    started = time.process_time()
    model, kept = dense.model, 1.0
    if name != "dense":
        model, kept = compressed(dense, name, options["keep"], windows)
    compressing = time.process_time() - started
    found = zero_shot(
        model,
        dense.tokenizer,
        tasks,
        limit=options["limit"],
        batch=32,
        task_folders=[options["folder"]],
    )
    words = ", ".join(f"{t} {100 * v['accuracy']:.1f}" for t, v in found.tasks.items())
    print(f"{name}: mean {found.mean}, standard error {found.standard_error}; {words}", flush=True)
    return {
        "model": name,
        "kept": kept,
        "compress_cpu_seconds": round(compressing, 1),
        "cpu_seconds": round(time.process_time() - started, 1),
        **found.record(),
    }


def main() -> None:
    """Measure what is missing and write the results after each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--limit", type=int, help="questions per task, all by default")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dense = load_model(MODEL)
    text = read_text(arguments.calibration)
    windows = calibration_windows(
        [text], dense.tokenizer, windows=WINDOWS, window_length=LENGTH, seed=SEED
    )
    with tempfile.TemporaryDirectory() as scratch:
        hashes = write_tasks(arguments.data, Path(scratch))
        if not hashes:
            parser.error(f"{arguments.data} holds neither blimp/*.jsonl nor piqa/valid.jsonl")
        options = {"keep": arguments.keep, "limit": arguments.limit}
        # Where the text lay plays no part; its hash says what it was.
        calibration = {**windows.record(), "sources": [arguments.calibration.name]}
        protocol = {**options, "calibration": calibration, "tasks": hashes}
        rows = rows_of(arguments.output, protocol)
        for name in ("dense", *arguments.recipes):
            if any(row["model"] == name for row in rows):
                continue
            given = {**options, "folder": scratch}
            rows.append(measure(dense, name, windows.ids, list(hashes), given))
            content = {
                "format_version": 1,
                "protocol": protocol,
                "environment": {**environment(), "processors": os.cpu_count()},
                "rows": rows,
            }
            arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def rows_of(path: Path, protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows that were measured with the same protocol."""
    if not path.is_file():
        return []
    known = json.loads(path.read_text(encoding="utf-8"))
    return known["rows"] if known["protocol"] == json.loads(json.dumps(protocol)) else []


if __name__ == "__main__":
    main()
