"""Zero-shot accuracy of folders, dense and compressed, with paired differences from the first.

    python benchmarks/zero_shot_folders.py DENSE COMPRESSED ... --task-folder TASKS --limit 1000

Every model is measured as it is stored, in a process of its own with one thread, and its row holds
which questions it answered right ("1" or "0" in their order), so that rows of different runs can
be paired. Rows that the results hold already for the same tasks and limit are not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from protocol import environment

from spectrim.evaluate.zero_shot import LITERATURE_TASKS, ZeroShot, task_difference, zero_shot
from spectrim.run.loading import load_model

RESULTS = Path(__file__).parent / "results" / "zero_shot_smollm2.json"


def measure(folder: str, tasks: list[str], task_folder: str, limit: int) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(1)
    started = time.process_time()
    loaded = load_model(folder)
    found = zero_shot(
        loaded.model, loaded.tokenizer, tasks, limit=limit, batch=16, task_folders=[task_folder]
    )
    answers = {
        task: "".join(str(int(right[question])) for question in sorted(right))
        for task, right in found.right.items()
    }
    return {
        "model": Path(folder).name,
        "weight_bytes": sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")),
        "cpu_seconds": round(time.process_time() - started, 1),
        **found.record(),
        "answers": answers,
    }


def paired(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """What `row` has more right than `reference`, on the same questions."""
    ours, theirs = (
        ZeroShot(
            right={t: {i: float(c) for i, c in enumerate(a)} for t, a in one["answers"].items()}
        )
        for one in (row, reference)
    )
    return task_difference(ours, theirs)


def main() -> None:
    """Measure what is missing, writing after every model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--task-folder", required=True)
    parser.add_argument("--tasks", nargs="*", default=list(LITERATURE_TASKS))
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    protocol = {"tasks": arguments.tasks, "limit": arguments.limit}
    content: dict[str, Any] = {"format_version": 1, "protocol": protocol, "rows": []}
    if arguments.output.exists():
        known = json.loads(arguments.output.read_text(encoding="utf-8"))
        content = known if known["protocol"] == protocol else content
    context = multiprocessing.get_context("spawn")
    for folder in arguments.folders:
        if any(row["model"] == Path(folder).name for row in content["rows"]):
            continue
        with context.Pool(1) as pool:
            asked = (folder, arguments.tasks, arguments.task_folder, arguments.limit)
            row = pool.apply(measure, asked)
        dense = next((r for r in content["rows"] if r["model"] == _dense(arguments)), None)
        if dense is not None:
            row["difference"] = paired(row, dense)
        content["rows"].append(row)
        content["environment"] = environment()
        arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"{row['model']}: mean {row['mean']}, {row.get('difference')}", flush=True)


def _dense(arguments: argparse.Namespace) -> str:
    return Path(arguments.folders[0]).name


if __name__ == "__main__":
    main()
