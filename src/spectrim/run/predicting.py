"""What a user asks before a run: how long, and how much memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.run.estimate import Estimate, estimate_run
from spectrim.run.learned.predicting import estimate_learning
from spectrim.run.options import RunOptions
from spectrim.run.resolving import check_size, resolve_recipe
from spectrim.run.word import among, takes
from spectrim.run.words import EstimateWords, RecipeWords

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes(EstimateWords)
def estimate(model: str | Path, **words: Unpack[EstimateWords]) -> Estimate:
    """Predict time and peak memory of `compress` with these arguments; no weight is read.

    What is kept hardly matters for that: `size` and `energy` play no part, and `max_loss`, which
    compresses twice, is not counted twice.

    Args:
        model: folder or name of the checkpoint.
        **words: those below.

    Raises:
        SpectrimError: what cannot be run as asked, or is not predicted.
    """
    asked: dict[str, Any] = dict(words)
    check_size(asked)
    resolved = resolve_recipe(asked["recipe"], **among(asked, RecipeWords))
    options = RunOptions.among(asked)
    if resolved.flow == "learned":
        return estimate_learning(model, resolved, options)
    return estimate_run(str(model), resolved, options, given_ranks=asked["plan"] is not None)
