"""Learned spectra on the bundled model: ACIP's curve from one run, SoCo with its parts taken out.

    python benchmarks/learned.py --calibration books_train.txt.gz --evaluation books_eval.txt \
        [--parts acip,fisher,recomputed,soco,ablation] [--windows 128]

`benchmarks/prepare_books.py` makes the texts. One ACIP training gives every keep; it stands beside
zs-svd and svd-llm, decided anew for every keep, and beside the one-pass Fisher order of the same
components, cut without training. SoCo is trained once per keep, at 0.4 also with only one of its
effects. Rows go to benchmarks/results/learned.json, with the CPU seconds that each took.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim import api
from spectrim.allocate.elastic import elastic_order
from spectrim.data import calibration_windows, evaluation_windows, read_text
from spectrim.demo.run import MODEL
from spectrim.evaluate.perplexity import perplexity
from spectrim.learn.healing import apply_plan
from spectrim.learn.surrogate import mean_square_gradients
from spectrim.recipes import get_recipe
from spectrim.run.learned.gating import Adapters, build_gated, gates_in_place, lessons_for
from spectrim.run.loading import load_model
from spectrim.run.opening import open_job
from spectrim.run.reporting import environment

RESULTS = Path(__file__).parent / "results" / "learned.json"
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
EVALUATED_TOKENS = 200_000
FISHER_STEPS = 64

# The recipes' defaults are for 7B models; these are for 6 million parameters and one CPU core.
ACIP = {
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
    "heal_grid": 16,
}
SOCO = {
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


@dataclass
class Bench:
    """Windows to calibrate on and to measure on."""

    calibration: Tensor
    evaluation: Tensor

    def measure(self, model: nn.Module, method: str, keep: float, kept: float, cpu: float) -> None:
        """Add one row and write all of them."""
        result = perplexity(model.float(), self.evaluation, batch=16)
        row = {
            "method": method,
            "keep": keep,
            "kept": kept,
            "nll": result.nll,
            "perplexity": result.perplexity,
            "cpu_seconds": cpu,
            "load_average": os.getloadavg()[0],
        }
        others = [r for r in rows_so_far() if (r["method"], r["keep"]) != (method, keep)]
        record = {
            "protocol": {
                "calibration_windows": list(self.calibration.shape),
                "evaluation_windows": list(self.evaluation.shape),
            },
            "settings": {"acip": ACIP, "soco": SOCO},
            "environment": environment(),
            "rows": sorted([*others, row], key=lambda r: (r["method"], -r["keep"])),
        }
        RESULTS.write_text(json.dumps(record, indent=2) + "\n")
        print(
            f"{method:22} keep {keep:.2f} kept {kept:.4f} nll {result.nll:.4f} "
            f"perplexity {result.perplexity:.2f} cpu {cpu:.0f} s",
            flush=True,
        )


def rows_so_far() -> list[dict[str, Any]]:
    """Read anew for every row, as parts may run side by side."""
    return json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []


def acip(bench: Bench) -> None:
    """One training, all sizes."""
    started = time.process_time()
    recipe = get_recipe("acip").with_changes(keep=ACIP["stop_keep"], learn=ACIP)
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "elastic"
        api.compress(MODEL, recipe=recipe, text=bench.calibration, output=artifact)
        cpu = time.process_time() - started
        opened = api.load_elastic(artifact)
        for keep in KEEPS:
            if keep >= opened.sizes.smallest_keep:
                plan = opened.resize(keep)
                bench.measure(opened.model, "acip", keep, plan.achieved_keep, cpu)


def fisher(bench: Bench) -> None:
    """The one-pass order of the same components, cut without any training."""
    started = time.process_time()
    loaded = load_model(MODEL)
    job = open_job(loaded, get_recipe("acip"), text=bench.calibration)
    gated, replay = build_gated(job, adapters=Adapters())
    lessons = lessons_for(job, replay, batch=4, accumulate=1, teacher=False)
    with gates_in_place(job, gated):
        squares = mean_square_gradients(gated, lessons, steps=FISHER_STEPS)
        costs = gated.spans.weights(gated.costs(), gated.device)
        keys = [(part,) for part in gated.spans.split(squares / costs)]
        order, kept = elastic_order(gated.curves, keys, limits=gated.limits)
        for layer, index in zip(gated.layers.values(), kept, strict=True):
            layer.order_components(torch.from_numpy(index))
        cpu = time.process_time() - started
        for keep in KEEPS:
            plan = order.plan(keep)
            apply_plan(gated, plan)
            bench.measure(loaded.model, "fisher order", keep, plan.achieved_keep, cpu)


def recomputed(bench: Bench) -> None:
    """Methods that decide anew for every size."""
    for name in ("svd-llm", "zs-svd"):
        for keep in KEEPS:
            _one(bench, name, name, keep, {})


def soco(bench: Bench) -> None:
    """One training per size."""
    for keep in (0.8, 0.6, 0.4):
        _one(bench, "soco", "soco", keep, {"learn": SOCO})


def ablation(bench: Bench) -> None:
    """Which of SoCo's effects does the work."""
    for parts in ("selection", "rescaling", "allocation"):
        _one(bench, f"soco {parts} only", "soco", 0.4, {"learn": SOCO | {"parts": parts}})


def _one(bench: Bench, method: str, recipe: str, keep: float, changes: dict[str, Any]) -> None:
    started = time.process_time()
    chosen = get_recipe(recipe).with_changes(keep=keep, **changes)
    result = api.compress(MODEL, recipe=chosen, text=bench.calibration)
    cpu = time.process_time() - started
    bench.measure(result.model, method, keep, result.plan.achieved_keep, cpu)


PARTS: dict[str, Callable[[Bench], None]] = {
    f.__name__: f for f in (acip, fisher, recomputed, soco, ablation)
}


def main() -> None:
    """Measure what was asked for and merge it into the committed results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--windows", type=int, help="evaluation windows, all by default")
    arguments = parser.parse_args()
    tokenizer = load_model(MODEL).tokenizer
    calibration = calibration_windows(
        read_text(arguments.calibration), tokenizer, windows=128, window_length=256, seed=0
    )
    evaluation = evaluation_windows(
        read_text(arguments.evaluation),
        tokenizer,
        window_length=256,
        max_tokens=EVALUATED_TOKENS,
    )
    bench = Bench(calibration.ids, evaluation.ids[: arguments.windows])
    if not any(row["method"] == "dense" for row in rows_so_far()):
        bench.measure(load_model(MODEL).model, "dense", 1.0, 1.0, 0.0)
    for part in arguments.parts.split(","):
        PARTS[part](bench)


if __name__ == "__main__":
    main()
