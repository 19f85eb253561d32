"""What a user asks before a run: how long, and how much memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from spectrim.allocate.plan import Plan
from spectrim.recipe import Recipe
from spectrim.recipes import DEFAULT_RECIPE
from spectrim.run.estimate import Estimate, estimate_run
from spectrim.run.learned.predicting import estimate_learning
from spectrim.run.resolving import check_size, resolve_recipe

__all__ = ["estimate"]


def estimate(
    model: str | Path,
    *,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    plan: Plan | str | Path | None = None,
    offload_streams: str | Path | None = None,
    out_of_core: bool | None = None,
    size: str | int | None = None,
    max_loss: float | None = None,
    energy: float | None = None,
    trust_remote_code: bool = False,
    **changes: Any,
) -> Estimate:
    """Predict time and peak memory of `compress` with these arguments; no weight is read.

    What is kept hardly matters for that: `size` and `energy` play no part, and `max_loss`, which
    compresses twice, is not counted twice. `changes`: of `resolve_recipe`.

    Raises:
        SpectrimError: what cannot be run as asked, or is not predicted.
    """
    check_size(plan, changes.get("keep"), size)
    resolved = resolve_recipe(recipe, **changes)
    if resolved.flow == "learned":
        return estimate_learning(
            model, resolved, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
    return estimate_run(
        str(model),
        resolved,
        device=device,
        dtype=dtype,
        out_of_core=out_of_core,
        given_ranks=plan is not None,
        offloaded=offload_streams is not None,
        trust_remote_code=trust_remote_code,
    )
