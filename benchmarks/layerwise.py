"""Layer-wise recipes on the bundled model: objectives 1 to 4, refined or not, and the baselines.

    python benchmarks/layerwise.py --train-text books_train.txt.gz --eval-text books_eval.txt
    python benchmarks/layerwise.py ... --only 'objective 4' --keeps 0.6
    python benchmarks/layerwise.py --show

The protocol is that of `protocol.py`. Ranks are the papers' floor(keep m n / (m + n)), the same for
every row except the searched ones; refinement has the published hyper-parameters with batch 16, so
that a block gets 200 steps.
"""

from __future__ import annotations

from pathlib import Path

from protocol import FLOORS, main, recipe_rows

from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe

RESULTS = Path(__file__).parent / "results" / "layerwise.json"
OBJECTIVES = {1: "plain", 2: "whitened", 3: "shifted", 4: "anchored"}
BLOCK = {"step": "block", "batch": 16}


def recipes() -> dict[str, Recipe]:
    """Every row of the table by name."""
    found = {}
    for number, objective in OBJECTIVES.items():
        for label, refine in (("", []), (" refined", [BLOCK])):
            found[f"objective {number}{label}"] = get_recipe("aa-svd").with_changes(
                decompose={"objective": objective}, allocate=FLOORS, refine=refine
            )
    for name in ("svd", "fwsvd", "asvd", "svd-llm", "svd-llm-update", "svd-llm-v2"):
        found[name] = get_recipe(name).with_changes(allocate=FLOORS)
    return found


if __name__ == "__main__":
    main(recipe_rows(recipes()), results=RESULTS, description=__doc__)
