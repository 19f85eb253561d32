"""How time grows with depth, windows and width, what a second process gains, and a model of both.

    python benchmarks/scaling.py [--parts growth,team] [--repeats 3]

Models are randomly initialised Llamas, texts random tokens: time is measured, not quality. Clocks
are CPU seconds of one thread, since wall time on a busy machine is the neighbours'. For two
processes the measure is the critical path: between two collectives the slower rank counts, which
is what wall time would be with a core for each. Single and double runs take turns in one launch,
and the best of all repeats is kept. Results go to benchmarks/results/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from scaling_model import ASSUMED, DEFAULT, SEQUENTIAL, WHITENED, Shape, extrapolated, work
from torch import Tensor

from spectrim.data.windows import given_windows
from spectrim.distributed.launch import membership
from spectrim.distributed.team import Team
from spectrim.model.tracing import trace
from spectrim.recipe import Recipe
from spectrim.run.cut import one_shot, sequential
from spectrim.run.cutting_all import choose, cut_targets
from spectrim.run.job import Job
from spectrim.run.survey import survey

RESULTS = Path(__file__).parent / "results" / "scaling.json"
VOCABULARY = 256
KEEP = 0.6
WHOLE = 2
"""Forward passes that the gradient pass of these small models is worth: one each way."""
FLOWS = {
    "one-shot": ({"flow": "one-shot", "decompose": {"objective": "whitened"}}, WHITENED),
    "sequential": ({"flow": "sequential", "decompose": {"objective": "anchored"}}, SEQUENTIAL),
    "default": (
        {
            "flow": "sequential",
            "decompose": {"objective": "anchored_kfac"},
            "allocate": {"rule": "knapsack", "score": "kfac"},
        },
        DEFAULT,
    ),
}
BASE = Shape(width=192, inner=528, kv=192, blocks=2, windows=32, length=128)
TEAM = Shape(width=384, inner=1056, kv=384, blocks=4, windows=32, length=128)


def grown(shape: Shape, axis: str, factor: int) -> Shape:
    """The shape, `factor` times as large along one axis."""
    changes: dict[str, int] = asdict(shape)
    for name in ("width", "inner", "kv") if axis == "width" else (axis,):
        changes[name] *= factor
    return Shape(**changes)


def new_job(shape: Shape, flow: str, team: Team | None = None) -> Job:
    """A job on a random model; every process builds the same one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.width,
            intermediate_size=shape.inner,
            num_hidden_layers=shape.blocks,
            num_attention_heads=shape.width // 64,
            num_key_value_heads=shape.kv // 64,
            max_position_embeddings=shape.length,
        )
    ).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (shape.windows, shape.length), generator=generator)
    recipe = {"name": flow, "keep": KEEP, "calibration": {"batch": 4}, **FLOWS[flow][0]}
    return Job(
        model=model,
        anatomy=trace(model, ids[:1]),
        windows=given_windows(ids),
        recipe=Recipe.model_validate(recipe),
        device=torch.device("cpu"),
        team=team or Team(),
    )


@contextmanager
def clocked(names: dict[tuple[Any, str], str], seconds: dict[str, float]):
    """CPU seconds of some functions by the name of their part, for the time of the context."""
    originals = {key: getattr(*key) for key in names}

    def wrapped(function, part):
        def timed(*arguments, **options):
            started = time.process_time()
            result = function(*arguments, **options)
            seconds[part] = seconds.get(part, 0.0) + time.process_time() - started
            return result

        return timed

    for (module, name), part in names.items():
        setattr(module, name, wrapped(originals[module, name], part))
    try:
        yield
    finally:
        for (module, name), function in originals.items():
            setattr(module, name, function)


PARTS = {
    (one_shot, "block_moments"): "forward and moments",
    (one_shot, "replace_target"): "cut",
    (sequential, "replace_target"): "cut",
    (survey, "decompose_target"): "cut",
}


def measured(shape: Shape, flow: str) -> dict[str, float]:
    """CPU seconds of one run in this process; what is no cut is forwards and moments."""
    job = new_job(shape, flow)
    seconds: dict[str, float] = {}
    with clocked(PARTS, seconds):
        started = time.process_time()
        cut_targets(job, choose(job))
        seconds["total"] = time.process_time() - started
    seconds["forward and moments"] = seconds["total"] - seconds["cut"]
    return seconds


def best(rows: list[dict[str, float]]) -> dict[str, float]:
    """The smallest of every number: noise only adds."""
    return {key: min(row[key] for row in rows) for key in rows[0]}


def growth(repeats: int) -> list[dict]:
    """Times of one process at 1, 2 and 4 times the depth, the windows and the width."""
    points = [(axis, k) for axis in ("blocks", "windows", "width") for k in (1, 2, 4)]
    seen: dict[tuple[str, str, int], list[dict]] = {}
    for _ in range(repeats):
        for flow in FLOWS:
            for axis, factor in points:
                if factor == 1 and axis != "blocks":
                    continue
                row = measured(grown(BASE, axis, factor), flow)
                seen.setdefault((flow, axis, factor), []).append(row)
                print(flow, axis, factor, {k: round(v, 2) for k, v in row.items()}, flush=True)
    rows = []
    for flow in FLOWS:
        for axis, factor in points:
            found = seen[flow, axis if factor > 1 else "blocks", factor]
            rows.append({"flow": flow, "axis": axis, "factor": factor, "cpu_seconds": best(found)})
    return rows


@dataclass(frozen=True)
class ClockedTeam(Team):
    """A team that notes this process's CPU time whenever the ranks meet."""

    meetings: list[float] = field(default_factory=list)

    def _meet(self) -> None:
        self.meetings.append(time.process_time())

    def sum_(self, tensors) -> None:
        """As a team does."""
        self._meet()
        super().sum_(tensors)
        self._meet()

    def broadcast_(self, tensors, source: int) -> None:
        """As a team does."""
        self._meet()
        super().broadcast_(tensors, source)
        self._meet()

    def gather(self, value: Any) -> list[Any]:
        """As a team does."""
        self._meet()
        found = super().gather(value)
        self._meet()
        return found


def one_turn(flow: str, team: Team) -> tuple[float, float]:
    """(critical path in CPU seconds, wall seconds) of one run on all ranks."""
    own = ClockedTeam(team.rank, team.size, team.device)
    job = new_job(TEAM, flow, own)
    team.barrier()
    own.meetings[:] = [time.process_time()]
    wall = time.perf_counter()
    cut_targets(job, choose(job))
    own.meetings.append(time.process_time())
    wall = time.perf_counter() - wall
    times = torch.tensor(own.meetings, dtype=torch.float64)
    spans: list[Tensor] = [torch.tensor(s) for s in team.gather(times.diff().tolist())]
    # Between two meetings everybody waits for the slowest.
    return float(torch.stack(spans).amax(0).sum()), max(team.gather(wall))


def team_turns(repeats: int) -> dict | None:
    """Single and double runs in turn; None on followers."""
    with membership() as team:
        rows: dict[str, dict[str, list[float]]] = {f: {} for f in FLOWS}
        for _ in range(repeats):
            for flow in FLOWS:
                alone = [0.0, 0.0]
                if team.leads:
                    alone = [*one_turn(flow, Team())]
                team.barrier()
                together = one_turn(flow, team)
                if team.leads:
                    for name, pair in (("one", alone), ("two", together)):
                        rows[flow].setdefault(f"{name} cpu", []).append(pair[0])
                        rows[flow].setdefault(f"{name} wall", []).append(pair[1])
                    print(flow, [round(x, 2) for x in (*alone, *together)], flush=True)
        if not team.leads:
            return None
    found = {}
    for flow, times in rows.items():
        least = {name: min(values) for name, values in times.items()}
        costs = [work(TEAM, FLOWS[flow][1], ranks, passes=WHOLE) for ranks in (1, 2)]
        found[flow] = {
            "critical_path_cpu_seconds": [least["one cpu"], least["two cpu"]],
            "wall_seconds": [least["one wall"], least["two wall"]],
            "speedup": least["one cpu"] / least["two cpu"],
            "speedup_wall": least["one wall"] / least["two wall"],
            "speedup_of_windows": costs[0].forward / costs[1].forward,
            "speedup_of_cuts": costs[0].cut / costs[1].cut,
        }
    return found


def constants(rows: list[dict]) -> dict:
    """Rates that make the cost model fit the runs best, and how far each run is off.

    Least squares of relative errors: every run counts the same, whatever its size.
    """
    found: dict[str, Any] = {}
    for flow, (_, kind) in FLOWS.items():
        mine = [row for row in rows if row["flow"] == flow]
        counts = [work(grown(BASE, row["axis"], row["factor"]), kind, passes=WHOLE) for row in mine]
        gather = torch.tensor([r["cpu_seconds"]["forward and moments"] for r in mine])
        cut = torch.tensor([r["cpu_seconds"]["cut"] for r in mine])
        products = torch.tensor([c.forward + c.moments for c in counts])
        cubes = torch.tensor([c.cut for c in counts])
        per_product, per_cube = _rate(products, gather), _rate(cubes, cut)
        total = per_product * products + per_cube * cubes
        off = total / torch.tensor([r["cpu_seconds"]["total"] for r in mine])
        for row, share in zip(mine, off.tolist(), strict=True):
            row["predicted_over_measured"] = share
        found[flow] = {
            "seconds_per_product_flop": per_product,
            "seconds_per_m_n_min": per_cube,
            "largest_error": float((off - 1).abs().max()),
        }
    return found


def product_rates() -> dict[str, float]:
    """FLOP per CPU second of plain square products here, the best of some."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        a = torch.randn(1024, 1024, dtype=dtype)
        seconds = []
        for _ in range(7):
            started = time.process_time()
            a @ a
            seconds.append(time.process_time() - started)
        found[str(dtype).removeprefix("torch.")] = 2 * 1024**3 / min(seconds)
    return found


def _rate(counts: Tensor, seconds: Tensor) -> float:
    ratios = counts / seconds
    return float(ratios.sum() / ratios.square().sum())


def hardware() -> dict:
    """What the numbers depend on."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads_per_process": torch.get_num_threads(),
        "torch": torch.__version__,
        "backend": "gloo over the loopback interface",
        "load_average": os.getloadavg()[0],
    }


def main() -> None:
    """Measure what was asked for and merge it into the committed results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="growth,team")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.member:
        found = team_turns(arguments.repeats)
        if found is not None:
            Path(os.environ["SCALING_OUTPUT"]).write_text(json.dumps(found))
        return
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["protocol"] = " ".join(__doc__.split("\n\n", 2)[2].split())
    results["hardware"] = hardware()
    if "growth" in arguments.parts.split(","):
        rows = growth(arguments.repeats)
        rates, found = product_rates(), constants(rows)
        for one in found.values():
            # In units of plain products, which say more of another machine than seconds do.
            one["share_of_fp32_peak"] = 1 / (one["seconds_per_product_flop"] * rates["float32"])
            one["fp64_flops_per_m_n_min"] = one["seconds_per_m_n_min"] * rates["float64"]
        cubes = {flow: one["fp64_flops_per_m_n_min"] for flow, one in found.items()}
        results |= {
            "base": asdict(BASE),
            "product_flops_per_second": rates,
            "constants": found,
            "growth": rows,
            "assumed_of_an_accelerator": ASSUMED,
            "extrapolation": extrapolated({f: kind for f, (_, kind) in FLOWS.items()}, cubes),
        }
    if "team" in arguments.parts.split(","):
        output = RESULTS.with_suffix(".team")
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        subprocess.run(
            [sys.executable, *command, "--member", "--repeats", str(arguments.repeats)],
            check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "SCALING_OUTPUT": str(output)},
        )
        results |= {"team_shape": asdict(TEAM), "team": json.loads(output.read_text())}
        output.unlink()
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
