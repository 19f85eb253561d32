"""The default recipe and its ingredients, one at a time, on the protocol of protocol.py.

    python benchmarks/recipe_study.py --train-text books_train.txt.gz --eval-text books_eval.txt
    python benchmarks/recipe_study.py ... --only '^spectrim$' --keeps 0.8 0.6 0.4 0.3

Rows: the recipe at its three efforts, and the fast one with one ingredient taken away or changed.
docs/recipe_study.md discusses the results.
"""

from __future__ import annotations

from pathlib import Path

from protocol import main, recipe_rows

from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe

RESULTS = Path(__file__).parent / "results" / "recipe_study.json"


def recipes() -> dict[str, Recipe]:
    """Every row of the study by name."""
    fast = get_recipe("spectrim")
    return {
        "spectrim": fast,
        "spectrim-balanced": get_recipe("spectrim-balanced"),
        "spectrim-thorough": get_recipe("spectrim-thorough"),
        "- packed storage": fast.with_changes(storage={"kind": "factored"}),
        "- output weight": fast.with_changes(decompose={"objective": "anchored"}),
        "- shifted stream": fast.with_changes(flow="one-shot", decompose={"objective": "kfac"}),
        "- planned ranks": fast.with_changes(allocate={"rule": "uniform"}),
        "- floor": fast.with_changes(allocate={"floor": 0.0}),
        "blend 0.5": fast.with_changes(decompose={"blend": 0.5}),
        "shrinkage 0.3": fast.with_changes(decompose={"shrink_out": 0.3}),
    }


if __name__ == "__main__":
    main(recipe_rows(recipes()), results=RESULTS, description=__doc__)
