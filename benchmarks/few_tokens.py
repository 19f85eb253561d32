r"""Few calibration tokens: recipes of the sequential flow beside svd-llm on the same windows.

    python benchmarks/few_tokens.py --train-text books_train.txt.gz --eval-text books_eval.txt \\
        --keeps 0.6 --seeds 0 1 2 --eval-windows 200

The protocol of protocol.py, with the first windows of its calibration alone, cut to the lengths
below. The bundled model is 256 channels wide, 688 in its down projections: with fewer tokens than
channels the least-squares map of an anchored objective is open, and with about as many it is
noise. `ridge 1e-6` is the map as published, `ridge 1e-2` one strength for all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protocol import Row, main, recipe_row
from torch import Tensor

from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe
from spectrim.run.loading import LoadedModel

RESULTS = Path(__file__).parent / "results" / "few_tokens.json"

SHAPES = ((1, 64), (1, 128), (3, 64), (1, 256), (3, 128), (6, 128), (8, 256))
"""Windows, and tokens of each."""


def recipes() -> dict[str, Recipe]:
    """What is compared, by name."""
    fast, plain = get_recipe("spectrim"), get_recipe("aa-svd").with_changes(refine=[])
    found = {"svd-llm": get_recipe("svd-llm"), "aa-svd, not refined": plain, "spectrim": fast}
    for ridge in (1e-6, 1e-2):
        changed = fast.with_changes(decompose={"ridge": ridge})
        found[f"spectrim, ridge {ridge:.0e}"] = changed
    return found


def with_few(recipe: Recipe, count: int, length: int) -> Row:
    """A row of a recipe that sees only so much of the calibration windows."""
    row = recipe_row(recipe)

    def run(loaded: LoadedModel, calibration: Tensor, keep: float) -> dict[str, Any]:
        return row(loaded, calibration[:count, :length], keep)

    return run


if __name__ == "__main__":
    rows = {
        f"{count * length} tokens, {name}": with_few(recipe, count, length)
        for count, length in SHAPES
        for name, recipe in recipes().items()
    }
    main(rows, results=RESULTS, description=__doc__)
