r"""Choices that only a mixture of experts knows, one at a time, on the protocol of protocol.py.

    python benchmarks/train_reference.py --text TRAIN --held-out HELD --family mixtral --experts 8 \
        --hidden 128 --layers 4 --inner 128 --batch 8 --window 128 --steps 3000 --dtype float32 \
        --tokenizer src/spectrim/demo/llama-books/tokenizer.json --out mixtral-books
    python benchmarks/experts_study.py --model mixtral-books --train-text ... --eval-text ... \
        --eval-windows 200 --only '^[^,]*$'
    python benchmarks/experts_study.py ... --eval-windows 200 --only ', few$' --keeps 0.6 \
        --seeds 0 1 2

Rows: published recipes, the default one at two efforts, and the default with one of its choices for
experts taken back. `own moments` and `pooled moments` are the ends of the shrinkage (moments of few
tokens as they are, the target alone); `equal ranks` gives the same matrix of all experts of a block
one rank, `uniform ranks` every matrix the same share.

Calibration is on the first 64 windows of the protocol: 32 tokens per channel for an expert, which
leaves the shrinkage little to do. Rows `..., few` have the first four alone: two per channel.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol import Row, main, recipe_row, recipe_rows
from torch import Tensor

from spectrim.moments import experts
from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe
from spectrim.run.loading import LoadedModel

RESULTS = Path(__file__).parent / "results" / "experts_study.json"
WINDOWS, FEW = 64, 4
WORTHS = {"own": 1e-9, "pooled": 1e9, "worth 0.06": 0.06, "worth 1": 1.0}
"""Tokens per channel that the target of the shrinkage counts for, beside the default."""


def worth(recipe: Recipe, tokens: float) -> Row:
    """A row in which the moments of experts are shrunk by another strength."""

    def run(loaded: LoadedModel, calibration: Tensor, keep: float) -> dict[str, Any]:
        experts.WORTH = tokens
        return recipe_row(recipe)(loaded, calibration, keep)

    return run


def first(count: int, row: Row) -> Row:
    """The row with the first calibration windows alone."""

    def run(loaded: LoadedModel, calibration: Tensor, keep: float) -> dict[str, Any]:
        return row(loaded, calibration[:count], keep)

    return run


def rows() -> dict[str, Row]:
    """Every row of the study by name."""
    fast = get_recipe("spectrim")
    names = ("svd", "svd-llm", "spectrim", "spectrim-balanced")
    found = recipe_rows(
        {name: get_recipe(name) for name in names}
        | {
            "equal ranks": fast.with_changes(allocate={"experts": "equal"}),
            "uniform ranks": fast.with_changes(allocate={"rule": "uniform"}),
        }
    )
    found |= {f"{name} moments": worth(fast, tokens) for name, tokens in WORTHS.items()}
    return {name: first(WINDOWS, row) for name, row in found.items()} | {
        f"{name}, few": first(FEW, row) for name, row in found.items()
    }


if __name__ == "__main__":
    main(rows(), results=RESULTS, description=__doc__)
