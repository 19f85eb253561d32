r"""Would an input factor that experts share earn its bytes? Predicted losses, way by way.

    python benchmarks/experts_shared_basis.py --model mixtral-books --train-text ... --eval-text ...

For the gate and up matrices of all experts the loss that K-FAC predicts, `½ tr(Eᵀ G E C)` in nats
per token, at equal numbers of weights. Every way plans its ranks over everything it stores:

    own    a factor pair per matrix
    pair   one input factor A for gate and up of an expert
    block  one A for all experts of a block, an output factor B per matrix

factored, and packed (whoever shares A, its gauge is one matrix of rank k). Experts of a block have
input moments of their own; A and the B's of a block are solved for in turns, each in the metric of
its matrix, from the leading directions of all of them. Moments come from the calibration windows of
experts_study.py and are shrunk as the default recipe does it.
"""

from __future__ import annotations

import argparse
import heapq
import json
from pathlib import Path
from typing import NamedTuple

import torch
from experts_study import WINDOWS
from protocol import KEEPS, TOKEN_CACHE, environment, fill_cache, random_windows
from torch import Tensor

from spectrim.decompose.kfac import output_root
from spectrim.decompose.statistics import tokens_of
from spectrim.linalg.psd import shrunk
from spectrim.linalg.scaling import row_and_column_sizes
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module, read_weight
from spectrim.moments.gradients import gradient_pass
from spectrim.run.experts import open_experts
from spectrim.run.loading import load_model

RESULTS = Path(__file__).parent / "results" / "experts_shared_basis.json"
SHRINK, TURNS, STEP = 0.1, 6, 4


class Matrix(NamedTuple):
    """One matrix in its metric: `L W`, (m, n), with `L` the root of G; C (n, n)."""

    weight: Tensor
    C: Tensor


class Stored(NamedTuple):
    """Matrices that share an input factor: its loss at rank 0, STEP, ..., and weights per rank."""

    losses: list[float]
    rows: int
    columns: int

    def weights(self, rank: int, packed: bool) -> int:
        """Numbers at a rank."""
        return rank * (self.rows + self.columns - packed * rank)


def matrices(model_folder: Path, ids: Tensor) -> dict[tuple[int, int], list[Matrix]]:
    """(block, expert) -> its gate and up matrix with their moments."""
    loaded = load_model(model_folder)
    open_experts(loaded)
    anatomy = trace(loaded.model, ids[:1])
    found = gradient_pass(loaded.model, anatomy, ids, needs={"G"}, input_needs={"C"}, batch=1)
    result: dict[tuple[int, int], list[Matrix]] = {}
    for group in anatomy.groups:
        if group.expert is None or len(group.targets) != 2:
            continue
        inputs = found.inputs[group.targets[0].name]
        assert inputs.C is not None
        for target in group.targets:
            W = read_weight(get_module(loaded.model, target.name)).double()
            rows, columns = row_and_column_sizes(W)
            root = output_root(found.outputs[target.name], rows, SHRINK, name=target.name)
            if root is not None:
                C = shrunk(inputs.C / tokens_of(inputs), SHRINK, columns)
                result.setdefault((group.block, target.expert or 0), []).append(
                    Matrix(root[0].mT @ W, C)
                )
    return result


def curve(sharing: list[Matrix]) -> Stored:
    """Losses of matrices that share one input factor, at every STEP-th rank."""
    columns = sharing[0].weight.shape[1]
    most = min(columns, sum(len(m.weight) for m in sharing))
    losses = [_loss(sharing, rank) for rank in range(0, most + 1, STEP)]
    return Stored(losses, sum(len(m.weight) for m in sharing), columns)


def _loss(sharing: list[Matrix], rank: int) -> float:
    whole = sum(float(((m.weight @ m.C) * m.weight).sum()) for m in sharing)
    if rank == 0:
        return whole / 2
    pooled = sum((m.C for m in sharing), torch.zeros_like(sharing[0].C)) / len(sharing)
    stacked = torch.cat([m.weight for m in sharing])
    root = torch.linalg.cholesky(pooled)
    A = torch.linalg.svd(stacked @ root)[2][:rank] @ torch.linalg.inv(root)
    alike = all(torch.equal(m.C, sharing[0].C) for m in sharing)
    ups = _output_factors(sharing, A)
    for _ in range(0 if alike else TURNS):
        A = _input_factor(sharing, ups, A)
        ups = _output_factors(sharing, A)
    left = [m.weight - up @ A for m, up in zip(sharing, ups, strict=True)]
    return sum(float(((d @ m.C) * d).sum()) for d, m in zip(left, sharing, strict=True)) / 2


def _output_factors(sharing: list[Matrix], A: Tensor) -> list[Tensor]:
    """The best B for this A, matrix by matrix."""
    return [torch.linalg.solve(A @ m.C @ A.mT, A @ m.C @ m.weight.mT).mT for m in sharing]


def _input_factor(sharing: list[Matrix], ups: list[Tensor], A: Tensor, steps: int = 20) -> Tensor:
    """The best A for these output factors, `Σ Bᵀ B A C = Σ Bᵀ W C`, by conjugate gradients."""
    squares = [up.mT @ up for up in ups]

    def apply(X: Tensor) -> Tensor:
        pairs = zip(squares, sharing, strict=True)
        return torch.stack([S @ X @ m.C for S, m in pairs]).sum(0)

    right = torch.stack([u.mT @ m.weight @ m.C for u, m in zip(ups, sharing, strict=True)]).sum(0)
    residual = right - apply(A)
    direction, size = residual, residual.square().sum()
    for _ in range(steps):
        if size <= 1e-20 * right.square().sum():
            break
        moved = apply(direction)
        length = size / (direction * moved).sum()
        A, residual = A + length * direction, residual - length * moved
        size, before = residual.square().sum(), size
        direction = residual + size / before * direction
    return A


def planned(stored: list[Stored], budget: float, *, packed: bool) -> float:
    """The loss of all at ranks that are raised where a weight saves most, within the budget."""
    at = [0] * len(stored)

    def gain(i: int) -> tuple[float, int]:
        best = (0.0, at[i])
        for step in range(at[i] + 1, len(stored[i].losses)):
            more = _weights(stored[i], step, packed) - _weights(stored[i], at[i], packed)
            if more <= 0:
                return (-float("inf"), step)
            best = min(best, ((stored[i].losses[step] - stored[i].losses[at[i]]) / more, step))
        return best

    waiting = [(*gain(i), i) for i in range(len(stored))]
    heapq.heapify(waiting)
    left = budget
    while waiting:
        slope, step, i = heapq.heappop(waiting)
        more = _weights(stored[i], step, packed) - _weights(stored[i], at[i], packed)
        if slope >= 0 or more > left:
            continue
        left, at[i] = left - more, step
        heapq.heappush(waiting, (*gain(i), i))
    return sum(s.losses[step] for s, step in zip(stored, at, strict=True))


def _weights(stored: Stored, step: int, packed: bool) -> int:
    """Numbers, never more than those of the dense matrices."""
    return min(stored.weights(STEP * step, packed), stored.rows * stored.columns)


def main() -> None:
    """All ways at all keeps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--train-text", type=Path)
    parser.add_argument("--eval-text", type=Path)
    parser.add_argument("--token-cache", type=Path, default=TOKEN_CACHE)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    texts = {"train": arguments.train_text, "eval": arguments.eval_text}
    fill_cache(arguments.token_cache, arguments.model, **texts)
    pairs = matrices(arguments.model, random_windows(arguments.token_cache)[:WINDOWS])
    blocks = sorted({block for block, _ in pairs})
    together = [[m for (b, _), two in pairs.items() if b == block for m in two] for block in blocks]
    ways = {
        "own": [curve([matrix]) for two in pairs.values() for matrix in two],
        "pair": [curve(two) for two in pairs.values()],
        "block": [curve(all_of) for all_of in together],
    }
    numbers = sum(m.weight.numel() for two in pairs.values() for m in two)
    rows = []
    for keep in KEEPS:
        for way, stored in ways.items():
            for packed in (False, True):
                loss = planned(stored, keep * numbers, packed=packed)
                rows.append({"way": way, "packed": packed, "keep": keep, "predicted": loss})
                print(rows[-1], flush=True)
    content = {"environment": environment(), "rows": rows}
    arguments.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
