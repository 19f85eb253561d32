"""How fast compressed linear layers run beside dense ones, on this machine's CPU.

    python benchmarks/inference.py [--threads 2] [--rounds 15] [--seconds 0.2] [--out FILE]

One decoder block of Llama-3.2-1B and one of Llama-7B shape with random weights: its seven linear
layers with the products between them, without attention, so that the ratio is that of the layers
that were compressed. Decode is one token, prefill 512. Every variant keeps half of the bytes,
except `packed_same_rank`, which has the rank of `factored` and so fewer bytes. `fused` joins the
first factors that share an input (`layers.fusion`), `folded` has the order of one packed layer
folded into the layers before it, `prepacked` has its weights in the order of the CPU's kernels
(`layers.prepack`), the dense ones too.

All variants are timed in turn within each round and the ratio to dense is taken inside the round;
reported are medians over rounds, so that a busy machine slows both sides alike. Beside every
ratio stands the ideal, dense bytes over stored bytes, and what share of it was reached: over plain
dense layers, and for prepacked variants over dense layers that are prepacked too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.allocate.budget import Shape, layer_bytes, rank_for
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.packed import PackedLinear
from spectrim.serve.fusion import fuse
from spectrim.serve.prepack import prepack

BLOCKS = {
    "llama-3.2-1b": {"hidden": 2048, "key_value": 512, "intermediate": 8192},
    "llama-7b": {"hidden": 4096, "key_value": 4096, "intermediate": 11008},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = {"decode": 1, "prefill": 512}
VARIANTS = (
    "dense",
    "factored",
    "factored_fused",
    "packed",
    "packed_same_rank",
    "packed_same_rank_folded",
    "dense_prepacked",
    "factored_prepacked",
    "packed_prepacked",
    "packed_same_rank_prepacked",
    "packed_same_rank_folded_prepacked",
)
RESULTS = Path(__file__).parent / "results" / "inference_cpu.json"


class FoldedDown(nn.Module):
    """The last layer of the MLP, packed on its in-side with its order folded into gate and up.

    The one fold that needs no gather at all: the rows of gate and up are put into the order of the
    pivots once. The library does not do it (docs/storage.md); this shows what it would give.
    """

    def __init__(self, n: int, m: int, rank: int, dtype: torch.dtype):
        super().__init__()
        self.rank = rank
        self.basis = nn.Linear(rank, m, bias=False, dtype=dtype)
        self.coefficients = nn.Linear(n - rank, rank, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(1, tokens, n) -> (1, tokens, m)."""
        return self.basis(x[..., : self.rank] + self.coefficients(x[..., self.rank :]))


class Linears(nn.Module):
    """The linear layers of one block in their order, with SiLU and the gate product between."""

    def __init__(self, layers: dict[str, nn.Module]):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(1, tokens, hidden) -> (1, tokens, hidden)."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        h = self.o(q)
        h[..., : k.shape[-1]] += k + v
        return self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def shapes(block: dict[str, int]) -> dict[str, Shape]:
    hidden, key_value, wide = block["hidden"], block["key_value"], block["intermediate"]
    return {
        "q": Shape(hidden, hidden),
        "k": Shape(key_value, hidden),
        "v": Shape(key_value, hidden),
        "o": Shape(hidden, hidden),
        "gate": Shape(wide, hidden),
        "up": Shape(wide, hidden),
        "down": Shape(hidden, wide),
    }


def build(
    block: dict[str, int], variant: str, keep: float, dtype: torch.dtype
) -> tuple[Linears, int]:
    """One variant with random weights, and the bytes that it stores."""
    kind = variant.split("_")[0]
    ranked_by = "factored" if "same_rank" in variant else kind
    layers: dict[str, nn.Module] = {}
    stored = 0
    for name, shape in shapes(block).items():
        m, n, size = shape.out_features, shape.in_features, dtype.itemsize
        if kind == "dense":
            rank, layer = None, nn.Linear(n, m, bias=False, dtype=dtype)
        else:
            largest = rank_for(shape, keep, storage=ranked_by, dtype_bytes=size)
            assert largest is not None
            rank = largest // 8 * 8
            if "folded" in variant and name == "down":
                layer = FoldedDown(n, m, rank, dtype)
            else:
                layer_class = LowRankLinear if kind == "factored" else PackedLinear
                layer = layer_class(n, m, rank, False, dtype=dtype)
        if isinstance(layer, PackedLinear):
            layer.order = torch.randperm(min(m, n), generator=generator(m)).to(torch.int32)
        layers[name] = layer
        stored += layer_bytes(shape, rank=rank, storage=kind, dtype_bytes=size)
    model = Linears(layers)
    randomize(model)
    if variant.endswith("_fused"):
        fuse(model, [("q", "k", "v"), ("gate", "up")])
    if variant.endswith("_prepacked"):
        assert prepack(model)
    return model.eval(), stored


def randomize(model: nn.Module) -> None:
    """Weights that keep activations near one, so that no value overflows or becomes denormal."""
    source = generator(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=source)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def timed(call: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def measure(
    models: dict[str, Linears],
    x: Tensor,
    *,
    rounds: int,
    seconds: float,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Seconds per call of every variant in every round; the order turns from round to round."""
    names = list(models)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        models[name](x)
    slowest = timed(lambda: models[names[0]](x), 1, time.perf_counter)
    repeats = max(1, round(seconds / slowest))
    # bf16 products of many tokens take seconds on processors without bf16 instructions.
    if slowest > seconds:
        rounds = max(3, round(rounds * seconds / slowest))
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(timed(lambda name=name: models[name](x), repeats, clock))
    return times


def summarize(times: dict[str, list[float]], stored: dict[str, int]) -> dict[str, Any]:
    """Medians over rounds of ratios taken inside a round.

    `share_of_ideal` compares with plain dense layers, `share_of_ideal_like_for_like` of a
    prepacked variant with dense layers that are prepacked too.
    """
    rows = {}
    for name, values in times.items():
        ideal = stored["dense"] / stored[name]
        speedup, quartiles = ratio(times["dense"], values)
        rows[name] = {
            "milliseconds": round(1e3 * statistics.median(values), 4),
            "milliseconds_best": round(1e3 * min(values), 4),
            "speedup": speedup,
            "speedup_quartiles": quartiles,
            "ideal": round(ideal, 3),
            "share_of_ideal": round(speedup / ideal, 3),
            "bytes": stored[name],
            "rounds": len(values),
        }
        if name.endswith("_prepacked"):
            against, _ = ratio(times["dense_prepacked"], values)
            rows[name]["speedup_like_for_like"] = against
            rows[name]["share_of_ideal_like_for_like"] = round(against / ideal, 3)
        base = name.replace("packed_same_rank_folded", "factored")
        base = base.replace("packed_same_rank", "factored")
        if base != name:
            rows[name]["time_over_factored"], _ = ratio(values, times[base])
    return rows


def ratio(above: list[float], below: list[float]) -> tuple[float, list[float]]:
    """Median and quartiles of `above / below`, round by round."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    quartiles = statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
    return round(statistics.median(found), 3), [round(quartiles[0], 3), round(quartiles[2], 3)]


def processor() -> str:
    """The processor's own name where the system tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a reader has to know to believe or repeat a number."""
    return {
        "keep": arguments.keep,
        "clock": "CPU time of the one thread" if arguments.cpu_time else "wall",
        "processor": processor(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
    }


def run(arguments: argparse.Namespace) -> None:
    for block in arguments.blocks:
        for dtype in arguments.dtypes:
            built = {v: build(BLOCKS[block], v, arguments.keep, DTYPES[dtype]) for v in VARIANTS}
            for phase in arguments.phases:
                labels = {"block": block, "dtype": dtype, "phase": phase}
                facts = conditions(arguments)
                rows = one_row(built, labels, arguments)
                show(labels, rows)
                record(arguments.out, {**labels, **facts, "variants": rows})


def one_row(
    built: dict[str, tuple[Linears, int]], labels: dict[str, str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """All variants of one block in one dtype and phase."""
    hidden = BLOCKS[labels["block"]]["hidden"]
    x = torch.randn(1, TOKENS[labels["phase"]], hidden, generator=generator(1))
    with torch.inference_mode():
        times = measure(
            {v: model for v, (model, _) in built.items()},
            x.to(DTYPES[labels["dtype"]]),
            rounds=arguments.rounds,
            seconds=arguments.seconds,
            clock=time.thread_time if arguments.cpu_time else time.perf_counter,
        )
    return summarize(times, {v: stored for v, (_, stored) in built.items()})


def record(path: Path, row: dict[str, Any]) -> None:
    """Put a row into the file, in place of an earlier one of the same block, dtype and phase."""
    key = ("block", "dtype", "phase")
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = [r for r in rows if any(r[k] != row[k] for k in key)] + [row]
    rows.sort(key=lambda r: [r[k] for k in key])
    path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def show(labels: dict[str, str], rows: dict[str, Any]) -> None:
    print(" ".join(labels.values()))
    for name, row in rows.items():
        print(
            f"  {name:36} {row['milliseconds']:9.3f} ms  {row['speedup']:5.2f}x of "
            f"{row['ideal']:4.2f}x  share {row['share_of_ideal']:4.2f} "
            f"{row.get('share_of_ideal_like_for_like', ''):5} "
            f"{row.get('time_over_factored', '')}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=0.2, help="per variant and round")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--phases", nargs="+", choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--cpu-time", action="store_true", help="one thread's CPU time, not wall")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.cpu_time and arguments.threads != 1:
        parser.error("--cpu-time counts one thread only: add --threads 1")
    torch.set_num_threads(arguments.threads)
    run(arguments)


if __name__ == "__main__":
    main()
