"""Would experts of a block that share a factor lose less for their bytes? Predicted loss (K-FAC).

    python benchmarks/experts_shared.py --model mixtral-books --token-cache TOKENS

On the calibration windows of protocol.py, for keeps of the bytes of all experts: the least sum of
predicted losses, in nats per token, where

- *each* matrix of an expert is cut by itself,
- *pair*: gate and up of an expert have one `A`, as one matrix of twice the rows,
- *block*: gate and up of all experts of a block have one `A` in common, and all `down` one `B`.

All are stored packed and may have any rank per unit that is cut. The common factor is the best one
for the mean moments of the block's experts; the other factors are then the best behind it under
the moments of their own expert, by which losses are counted. A shared factor saves bytes only
where experts need the same directions.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from protocol import environment, random_windows
from torch import Tensor

from spectrim.allocate.budget import Shape, bytes_by_rank
from spectrim.evaluate.points import lower_hull
from spectrim.linalg.psd import shrunk
from spectrim.linalg.scaling import row_and_column_sizes
from spectrim.model.experts.unfold import unfold
from spectrim.model.experts.watching import find_experts
from spectrim.model.tracing import trace
from spectrim.model.weights import get_module, read_weight
from spectrim.moments.gradients import gradient_pass
from spectrim.run.loading import load_model

RESULTS = Path(__file__).parent / "results" / "experts_shared.json"
KEEPS = (0.8, 0.6, 0.4)
SHRINKAGE = 0.1  # as the default recipe's, on both sides
GRID = 24  # ranks tried for a shared factor

Weighed = tuple[Tensor, Tensor, Tensor]
"""W (out, in), G (out, out), C (in, in), so that ½ tr(Δᵀ G Δ C) is a loss in nats per token."""


def tails(parts: list[Weighed], shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and losses by rank, of parts that share their `A`."""
    C = torch.stack([C for _, _, C in parts]).mean(0)
    root = torch.linalg.cholesky(C)
    stacked = sum((W @ root).mT @ G @ (W @ root) for W, G, _ in parts)
    directions = torch.linalg.eigh(stacked).eigenvectors.flip(-1)
    # Rows of A are orthonormal in C, so that the first k of them are the best k.
    A = torch.linalg.solve_triangular(root.mT, directions, upper=True).mT
    ranks = np.unique(np.linspace(0, len(C), GRID + 1).round().astype(int))
    losses = [sum(_loss(part, A[:rank]) for part in parts) for rank in ranks]
    every = np.asarray(bytes_by_rank(shape, storage="packed", dtype_bytes=2))
    return every[ranks], np.asarray(losses)


def _loss(part: Weighed, A: Tensor) -> float:
    """With the best `B` behind the first rows of A."""
    W, G, C = part
    left = W @ C @ W.mT
    if len(A):
        seen = W @ C @ A.mT
        left = left - seen @ torch.linalg.solve(A @ C @ A.mT, seen.mT)
    return float((G * left).sum()) / 2


def least(curves: list[tuple[np.ndarray, np.ndarray]], budget: float) -> float:
    """The least sum of losses within the bytes, along the lower hulls."""
    total = sum(float(losses[0]) for _, losses in curves)
    steps = []
    for sizes, losses in curves:
        hull = sorted(lower_hull(list(zip(sizes.tolist(), losses.tolist(), strict=True))))
        steps += [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(hull)]
    for size, change in sorted(steps, key=lambda s: s[1] / s[0]):
        share = min(1.0, budget / size)
        total, budget = total + share * change, budget - share * size
    return total


def turned(parts: list[Weighed]) -> list[Weighed]:
    """The transposed problem, in which a common `B` is a common `A`."""
    return [(W.mT, C, G) for W, G, C in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--token-cache", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = load_model(options.model).model.float()
    ids = random_windows(options.token_cache)
    unfold(model, find_experts(model, ids[:1, :8])[0])
    anatomy = trace(model, ids[:1, :8])
    found = gradient_pass(model, anatomy, ids, needs={"G"}, input_needs={"C"}, clip=10.0)
    experts: dict[int, dict[str, list[Weighed]]] = {}
    for group in anatomy.groups():
        for target in group.targets if group.expert is not None else ():
            W = read_weight(get_module(model, target.name)).detach().double()
            rows, columns = row_and_column_sizes(W)
            out, into = found.outputs[target.name], found.inputs[group.targets[0].name]
            assert out.G is not None and into.C is not None
            G = shrunk(out.G / out.tokens, SHRINKAGE, rows)
            C = shrunk(into.C / into.tokens, SHRINKAGE, columns)
            kinds = experts.setdefault(group.block, {})
            kinds.setdefault(target.name.rsplit(".", 1)[-1], []).append((W, G, C))
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"each": [], "pair": [], "block": []}
    dense = 0
    for kinds in experts.values():
        gate, up = kinds.pop("gate"), kinds.pop("up")
        down = [part for parts in kinds.values() for part in parts]
        m, n = gate[0][0].shape
        single, pair = Shape(m, n), Shape(2 * m, n)
        apart = [tails(turned([part]), Shape(m, n)) for part in down]
        curves["each"] += [tails([part], single) for part in gate + up] + apart
        curves["pair"] += [tails(list(two), pair) for two in zip(gate, up, strict=True)] + apart
        curves["block"].append(tails(gate + up, Shape(2 * m * len(gate), n)))
        curves["block"].append(tails(turned(down), Shape(m * len(down), n)))
        dense += 2 * 3 * m * n * len(gate)
    losses = {
        str(keep): {way: least(found, keep * dense) for way, found in curves.items()}
        for keep in KEEPS
    }
    protocol = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    record = {"protocol": protocol, "environment": environment(), "predicted_nats": losses}
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(losses, indent=1))


if __name__ == "__main__":
    main()
