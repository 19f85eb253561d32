"""The default recipe and its ingredients, one at a time, on the protocol of protocol.py.

    python benchmarks/recipe_study.py --train-text books_train.txt.gz --eval-text books_eval.txt
    python benchmarks/recipe_study.py ... --only '^spectrim$' --keeps 0.8 0.6 0.4 0.3 --seeds 0 1 2
    python benchmarks/recipe_study.py ... --model gpt-neox-books --output results/neox.json

Rows: the recipe at its three efforts, the fast one with one ingredient taken away or changed (`-`
and `fast:`), further training (`+`), other number formats, the dense model rounded to them (with
`--keeps 1`), and published recipes as they are, for models on which no authors' code was run.
docs/recipe_study.md discusses the results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol import Row, main, recipe_rows
from torch import Tensor

from spectrim.model.tracing import trace
from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe
from spectrim.run.loading import LoadedModel
from spectrim.studies.quantized import REFERENCES, round_targets

RESULTS = Path(__file__).parent / "results" / "recipe_study.json"


PUBLISHED = ("svd", "svd-llm", "asvd", "aa-svd", "zs-svd")


def recipes() -> dict[str, Recipe]:
    """Every row of the study by name."""
    fast = get_recipe("spectrim")
    (block,) = get_recipe("spectrim-balanced").model_dump(mode="json")["refine"]
    *_, distill = get_recipe("spectrim-thorough").model_dump(mode="json")["refine"]
    found = {
        "spectrim": fast,
        "spectrim-balanced": get_recipe("spectrim-balanced"),
        "spectrim-thorough": get_recipe("spectrim-thorough"),
        "- packed storage": fast.with_changes(storage={"kind": "factored"}),
        "- output weight": fast.with_changes(decompose={"objective": "anchored"}),
        "- shifted stream": fast.with_changes(flow="one-shot", decompose={"objective": "kfac"}),
        "- planned ranks": fast.with_changes(allocate={"rule": "uniform"}),
        "- floor": fast.with_changes(allocate={"floor": 0.0}),
        "fast: floor 0.3": fast.with_changes(allocate={"floor": 0.3}),
        "fast: blend 0.5": fast.with_changes(decompose={"blend": 0.5}),
        "fast: shrinkage 0.02": fast.with_changes(decompose={"shrink_out": 0.02}),
        "fast: shrinkage 0.3": fast.with_changes(decompose={"shrink_out": 0.3}),
        "fast: BOS in half": fast.with_changes(calibration={"bos": "half"}),
        "+ blocks, published": fast.with_changes(
            refine=[{"step": "block", "epochs": 10, "batch": 16}]
        ),
        "+ blocks, look-ahead": fast.with_changes(refine=[block | {"look_ahead": 1}]),
        "+ distillation alone": fast.with_changes(refine=[distill]),
        "+ distillation, no samples": fast.with_changes(
            refine=[block, distill | {"windows": None}]
        ),
        "int8": fast.with_changes(storage={"weights": "int8"}),
        "int8 factored": fast.with_changes(storage={"kind": "factored", "weights": "int8"}),
        "int4": fast.with_changes(storage={"weights": "int4"}),
        "auto": fast.with_changes(storage={"weights": "auto"}),
    }
    mixed = {"weights": "auto"}
    found["auto, nothing cut"] = fast.with_changes(storage=mixed | {"kind": "dense"})
    for effort in ("balanced", "thorough"):
        found[f"auto, {effort}"] = get_recipe(f"spectrim-{effort}").with_changes(storage=mixed)
    return found | {name: get_recipe(name) for name in PUBLISHED}


def rounded(weights: str) -> Row:
    """The dense model in integers: what low rank must be held against at equal bytes."""

    def run(loaded: LoadedModel, calibration: Tensor, keep: float) -> dict[str, Any]:
        anatomy = trace(loaded.model, calibration[:1, :8])
        before, after = round_targets(loaded.model, anatomy, weights, loaded.stored_dtype)
        return {"kept": after / before}

    return run


if __name__ == "__main__":
    formats = {f"dense {weights}": rounded(weights) for weights in REFERENCES}
    main(recipe_rows(recipes()) | formats, results=RESULTS, description=__doc__)
