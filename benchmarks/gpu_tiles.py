"""Which tiles suit the kernel for few tokens on a card: products of a Llama-7B block, one token.

    python benchmarks/gpu_tiles.py OUT.json [--workers 14]

Products of plain factors, of both halves of packed layers, and of dense int8 and int4 matrices are
launched with other rows per program, columns at a time and warps than `triton_products` chooses.
Each timing is a CUDA graph over as many copies of the weight as do not fit a cache. Kernels are
compiled beforehand by several processes, since compiling takes most of the time.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from gpu import in_a_graph, seconds_per_call

from spectrim.devices import accelerator, name_of, wait_for
from spectrim.layers.quantized import QuantizedLinear
from spectrim.serve.product import INSIDE, NATIVE, OUTSIDE, PLAIN, Product, product_of

CACHED = 200e6
"""Bytes that are more than caches hold."""

BUDGET = 0.01
"""Seconds behind each timing."""

SHAPES = {
    "plain": [
        *((3072, 4096), (12288, 1024), (1024, 4096), (4096, 1024)),
        *((2976, 4096), (22016, 1488), (1488, 11008), (4096, 1488)),
    ],
    "outside": [(2896, 1200)],
    "inside": [(1200, 2896), (1728, 2368)],
    "int8": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (3072, 4096)],
    "int4": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (12288, 1024)],
}
Tiles = tuple[int, int, int]


def candidates(kind: str) -> list[Tiles]:
    """(rows, columns, warps)."""
    span = 32 * {"int8": 16, "int4": 32}.get(kind, 8)
    spans = [(warps, span * warps * times) for warps in (1, 2, 4, 8) for times in (1, 2)]
    return [
        (rows, columns, warps)
        for warps, columns in spans
        for rows in (1, 2, 4, 8)
        if 512 <= columns <= 4096 and rows * columns <= 32768
    ]


def product(kind: str, shape: tuple[int, int]) -> tuple[Product, torch.Tensor]:
    """A random product and one token for it."""
    rows, columns = shape
    place = accelerator()
    width, order, rank, mode = columns, None, 0, PLAIN
    if kind in ("outside", "inside"):
        rank, mode = (columns, OUTSIDE) if kind == "outside" else (rows, INSIDE)
        order = torch.randperm(rows + columns, device=place).to(torch.int32)
        width = columns + (rank if kind == "inside" else 0)
    x = torch.randn(1, width, device=place, dtype=torch.bfloat16)
    if kind in ("int8", "int4"):
        part = QuantizedLinear(columns, rows, kind, device=place, dtype=torch.bfloat16)
        part.codes.copy_(torch.randint_like(part.codes, 0, 127))
        part.scale.uniform_()
        found = product_of(part)
        assert found is not None
        return found, x
    W = torch.randn(rows, columns, device=place, dtype=torch.bfloat16)
    return Product(W, None, None, order, None, rank, mode, NATIVE, columns), x


def _call(one: Product, x: torch.Tensor, tiles: Tiles) -> None:
    from spectrim.serve.triton_products import launch

    launch([x], [one], ROWS=tiles[0], COLUMNS=tiles[1], num_warps=tiles[2])


def compiled(job: tuple[str, tuple[int, int], Tiles]) -> str:
    """Compile one kernel; what went wrong, or nothing."""
    kind, shape, tiles = job
    try:
        _call(*product(kind, shape), tiles)
    except RuntimeError as error:  # tiles that need more than a card has
        return f"{job}: {error}"
    return ""


def microseconds(kind: str, shape: tuple[int, int], tiles: Tiles) -> float:
    """Of one launch with a weight that no cache holds."""
    one, x = product(kind, shape)
    size = sum(t.numel() * t.element_size() for t in one[:3] if t is not None)
    copies = [product(kind, shape)[0] for _ in range(max(2, int(CACHED / size)))]

    def all_of_them() -> None:
        for copy in copies:
            _call(copy, x, tiles)

    replay = in_a_graph(all_of_them)
    assert replay is not None  # there is a card, or `main` has ended
    return 1e6 * seconds_per_call(replay, BUDGET) / len(copies)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--workers", type=int, default=14)
    arguments = parser.parse_args()
    place = accelerator()
    if place is None:
        sys.exit("there is no card here")
    # Kernels know whether sizes are multiples of 16, not the sizes.
    jobs = [(kind, shapes[-1], t) for kind, shapes in SHAPES.items() for t in candidates(kind)]
    with ProcessPoolExecutor(arguments.workers, mp_context=get_context("spawn")) as pool:
        refused = [error for error in pool.map(compiled, jobs) if error]
    wait_for(place)
    rows = {}
    for kind, shapes in SHAPES.items():
        able = [
            t for t in candidates(kind) if not any(str((kind, shapes[-1], t)) in r for r in refused)
        ]
        for shape in shapes:
            found = sorted((microseconds(kind, shape, tiles), tiles) for tiles in able)
            rows[f"{kind} {shape}"] = found
            print(kind, shape, [(round(us, 1), tiles) for us, tiles in found[:3]], flush=True)
    content = {"device": name_of(place), "torch": torch.__version__, "refused": refused}
    arguments.out.write_text(json.dumps(content | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
