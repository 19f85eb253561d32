"""What a run costs by arithmetic: FLOPs, bytes held and bytes sent per stage, for any Llama shape.

Counts are of the algorithm, not of a machine; `benchmarks/scaling.py` measures the seconds that a
FLOP of each kind takes and checks the products against runs. See docs/scaling.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from spectrim.moments.gradients_by_block import streams_held

__all__ = [
    "DEFAULT",
    "SEQUENTIAL",
    "WHITENED",
    "Flow",
    "Shape",
    "Work",
    "communication",
    "extrapolated",
    "memory",
    "work",
]


@dataclass(frozen=True)
class Shape:
    """A decoder and its calibration.

    Attributes:
        width: d of the hidden states.
        inner: f of the feed-forward layers.
        kv: width of keys and values.
        blocks: number of decoder blocks.
        windows: calibration windows.
        length: tokens per window.
    """

    width: int
    inner: int
    kv: int
    blocks: int
    windows: int
    length: int

    @property
    def tokens(self) -> int:
        """Calibration tokens."""
        return self.windows * self.length

    @property
    def groups(self) -> list[tuple[int, list[int]]]:
        """Of one block: input width, and the output widths that share it."""
        d, f, kv = self.width, self.inner, self.kv
        return [(d, [d, kv, kv]), (d, [d]), (d, [f, f]), (f, [d])]

    @property
    def targets(self) -> list[tuple[int, int]]:
        """(out, in) of a block's linear layers."""
        return [(m, n) for n, outs in self.groups for m in outs]

    @property
    def weights(self) -> int:
        """Numbers in a block's targets."""
        return sum(m * n for m, n in self.targets)


@dataclass(frozen=True)
class Flow:
    """A training-free recipe: streams run forward, second moments per group, sharing of the cut.

    Attributes:
        streams: 1 for the original network, 2 with the shifted one.
        moments: matrices per group: `C`, or `C`, `C'` and `D`.
        together: whether whole blocks are shared out, or one group after the other.
        surveyed: whether a survey with gradient moments comes first, which takes every block
            through a backward pass and decomposes every target once more.
    """

    streams: int
    moments: int
    together: bool
    surveyed: bool = False


WHITENED = Flow(streams=1, moments=1, together=True)
SEQUENTIAL = Flow(streams=2, moments=3, together=False)
DEFAULT = Flow(streams=2, moments=3, together=False, surveyed=True)

BY_BLOCK = 4
"""A gradient pass in forward passes: three forwards and a backward to the activations alone."""


@dataclass(frozen=True)
class Work:
    """FLOPs on the busiest of some processes.

    Attributes:
        forward: products of the blocks, in the model's dtype.
        moments: products of inputs with themselves, fp32.
        cut: sum of `m n min(m, n)` over the targets of the busiest process; fp64, times a constant.
    """

    forward: float
    moments: float
    cut: float


def work(shape: Shape, flow: Flow, ranks: int = 1, *, passes: int = BY_BLOCK) -> Work:
    """Work of the busiest process; windows are split, targets go to whoever has least.

    Args:
        shape: of the model.
        flow: of the recipe.
        ranks: processes.
        passes: forward passes that the gradient pass of a survey is worth; 2 for small models.
    """
    mine = -(-shape.windows // ranks) * shape.length
    d = shape.width
    # Queries meet all keys and values of their window, without use of causality.
    attention = 4 * shape.length * d
    projections = 2 * shape.weights
    runs = flow.streams + (passes if flow.surveyed else 0)
    forward = shape.blocks * runs * mine * (projections + attention)
    squares = flow.moments * sum(2 * n * n for n, _ in shape.groups)
    cut = _busiest(shape, flow, ranks)
    if flow.surveyed:
        squares += sum(2 * n * n for n, _ in shape.groups)
        squares += sum(2 * m * m for m, _ in shape.targets)
        cut += _busiest(shape, WHITENED, ranks)
    return Work(float(forward), float(shape.blocks * mine * squares), cut)


def _busiest(shape: Shape, flow: Flow, ranks: int) -> float:
    from spectrim.distributed.owners import factorisation_cost, loads, owners

    def longest(costs: list[int]) -> float:
        return max(loads(costs, owners(costs, ranks), ranks))

    block = [factorisation_cost(m, n) for m, n in shape.targets]
    if not flow.together:
        groups = ([factorisation_cost(m, n) for m in outs] for n, outs in shape.groups)
        return shape.blocks * sum(longest(list(costs)) for costs in groups)
    # As `run/cut/sharing.py` does: blocks are taken together until nine tenths are busy.
    done, total, waiting = 0, 0.0, 0
    while done < shape.blocks:
        waiting += 1
        costs = block * waiting
        busy = sum(costs) / (ranks * longest(costs))
        if ranks == 1 or busy >= 0.9 or done + waiting == shape.blocks:
            total += longest(costs)
            done, waiting = done + waiting, 0
    return total


def communication(shape: Shape, flow: Flow, ranks: int, *, keep: float, bytes_each: int) -> float:
    """Bytes that one process sends in a run: moments by a ring, factors by a broadcast."""
    moments = flow.moments * sum(8 * n * n for n, _ in shape.groups)
    if flow.surveyed:
        moments += sum(8 * n * n for n, _ in shape.groups)
        moments += sum(8 * m * m for m, _ in shape.targets)
    factors = keep * shape.weights * bytes_each
    if flow.surveyed:
        factors += 4 * shape.weights  # the survey's, fp32, up to break-even
    return shape.blocks * (2 * (ranks - 1) / ranks * moments + (factors if ranks > 1 else 0.0))


def memory(shape: Shape, flow: Flow, ranks: int, *, bytes_each: int) -> dict[str, float]:
    """Bytes per process while a block is worked on, embeddings and head left out."""
    mine = -(-shape.windows // ranks) * shape.length
    streams = flow.streams + (flow.streams > 1)
    moments = 8 * flow.moments * sum(n * n for n, _ in shape.groups)
    if not flow.together:
        moments = 8 * flow.moments * max(n for n, _ in shape.groups) ** 2
    if flow.surveyed:
        streams = max(streams, streams_held(shape.blocks))
        own = sum(n * n for n, _ in shape.groups) + sum(m * m for m, _ in shape.targets)
        moments = max(moments, 8 * own)
    largest = max(m * n for m, n in shape.targets)
    return {
        "model": shape.blocks * shape.weights * bytes_each,
        # The original stream, the shifted one, and the outputs that become the next original.
        "streams": streams * mine * shape.width * bytes_each,
        "moments": moments,
        # Weight, full-rank map, both factors and two matrices of the eigenproblem, fp64.
        "decomposition": 8 * (4 * largest + 2 * shape.width**2),
    }


LARGE = {
    "7B": Shape(width=4096, inner=11008, kv=4096, blocks=32, windows=256, length=2048),
    "70B": Shape(width=8192, inner=28672, kv=1024, blocks=80, windows=256, length=2048),
    "405B": Shape(width=16384, inner=53248, kv=1024, blocks=126, windows=256, length=2048),
}
"""Llama 2 7B, Llama 2 and 3 70B, Llama 3.1 405B, with the default recipe's calibration."""

ASSUMED = {"forward": 3e14, "moments": 4e13, "cut": 2e12, "link": 1e11}
"""What one accelerator is assumed to sustain: FLOP/s of bf16 forwards, of fp32 products and of fp64
decompositions, and bytes/s that it sends. None of this was measured."""


def extrapolated(flows: Mapping[str, Flow], flops_per_cube: Mapping[str, float]) -> list[dict]:
    """Hours and gigabytes of large models on 1, 8 and 64 accelerators.

    Args:
        flows: by name.
        flops_per_cube: fp64 FLOPs of a decomposition over `m n min(m, n)`, measured, by flow.
    """
    rows = []
    for model, shape in LARGE.items():
        for name, flow in flows.items():
            for ranks in (1, 8, 64):
                done = work(shape, flow, ranks)
                sent = communication(shape, flow, ranks, keep=0.6, bytes_each=2)
                seconds = {
                    "forward": done.forward / ASSUMED["forward"],
                    "moments": done.moments / ASSUMED["moments"],
                    "cut": flops_per_cube[name] * done.cut / ASSUMED["cut"],
                    "communication": sent / ASSUMED["link"],
                }
                held = memory(shape, flow, ranks, bytes_each=2)
                rows.append(
                    {
                        "model": model,
                        "flow": name,
                        "accelerators": ranks,
                        "hours": {k: v / 3600 for k, v in seconds.items()},
                        "total_hours": sum(seconds.values()) / 3600,
                        "gigabytes": {k: v / 1e9 for k, v in held.items()},
                    }
                )
    return rows
