"""Seconds per allocation rule on a survey of Llama-7B shape with synthetic spectra.

    python benchmarks/plan.py

224 targets of 4096 components. Spectra decay exponentially at a random speed; signed scores are
noise in proportion to the singular values, half of them negative, as measured on real models.
Writes `benchmarks/results/plan.json`.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from spectrim.allocate import Curve, Limits, Plan, Shape, allocate, global_order, ranks_at

BLOCKS, WIDTH, HIDDEN = 32, 4096, 11008
PROJECTIONS = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (WIDTH, WIDTH),
    "self_attn.v_proj": (WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (HIDDEN, WIDTH),
    "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}
KEEPS = (0.8, 0.6, 0.4)
LIMIT_SECONDS = 2.0  # of one core: rules run in one thread, wall time depends on the neighbors
REPEATS = 3


def synthetic_survey(seed: int = 0) -> list[Curve]:
    generator = np.random.default_rng(seed)
    position = np.arange(WIDTH) / WIDTH
    curves = []
    for block in range(BLOCKS):
        for projection, (m, n) in PROJECTIONS.items():
            decay, bend, scale = (
                generator.uniform(2, 9),
                generator.uniform(0.4, 1),
                generator.normal(),
            )
            energy = np.exp(scale - decay * position**bend)
            energy = np.sort(energy * np.exp(0.05 * generator.normal(size=WIDTH)))[::-1].copy()
            score = generator.normal(size=WIDTH) * np.sqrt(energy) * 1e-3
            curves.append(
                Curve(
                    name=f"model.layers.{block}.{projection}",
                    block=block,
                    projection=projection,
                    shape=Shape(m, n),
                    energy=torch.from_numpy(energy),
                    total=float(energy.sum()),
                    score=torch.from_numpy(score),
                )
            )
    return curves


def measure(make: Callable[[], Plan]) -> dict[str, float | int | None]:
    """Best of some repeats: other work on the machine only ever adds time."""
    seconds, cpu_seconds = [], []
    for _ in range(REPEATS):
        wall, cpu = time.perf_counter(), time.process_time()
        plan = make()
        seconds.append(time.perf_counter() - wall)
        cpu_seconds.append(time.process_time() - cpu)
    return {
        "seconds": round(min(seconds), 3),
        "cpu_seconds": round(min(cpu_seconds), 3),
        "achieved_keep": plan.achieved_keep,
        "dense_targets": sum(e.rank is None for e in plan.entries),
        "predicted_loss": plan.predicted_loss,
    }


def rows(curves: list[Curve]) -> dict[str, dict[str, float | int | None]]:
    """One row per rule, storage and keep."""
    found = {}
    for storage in ("factored", "auto"):
        limits = Limits(storage=storage)
        for rule in ("uniform", "loss_ratio", "sensitivity", "zero_sum", "knapsack"):
            for keep in KEEPS:
                row = measure(
                    lambda r=rule, k=keep, x=limits: allocate(curves, r, keep=k, limits=x)
                )
                found[f"{rule} {storage} {keep}"] = row
        order = global_order(curves)
        for keep in KEEPS:
            found[f"order {storage} {keep}"] = measure(
                lambda k=keep, o=order, x=limits: ranks_at(o, curves, keep=k, limits=x)
            )
    wall, cpu = time.perf_counter(), time.process_time()
    global_order(curves)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    found["order built"] = {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}
    return found


def processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    torch.set_num_threads(1)
    curves = synthetic_survey()
    result = {
        "survey": f"{len(curves)} targets, {WIDTH} components each, synthetic",
        "hardware": {"processor": processor(), "cores": os.cpu_count()},
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
        "limit_cpu_seconds": LIMIT_SECONDS,
        "repeats": REPEATS,
        "rows": rows(curves),
    }
    path = Path(__file__).parent / "results" / "plan.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, row in result["rows"].items():
        mark = "" if row["cpu_seconds"] < LIMIT_SECONDS else "   over the limit"
        print(f"{name:28s} {row['seconds']:7.3f} s  cpu {row['cpu_seconds']:7.3f}{mark}")


if __name__ == "__main__":
    main()
