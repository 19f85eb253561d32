"""Where the ranks should go: allocation rules, scores and selection keys on the bundled model.

    python benchmarks/global_allocation.py --train-text books_train.txt.gz --eval-text eval.txt
    python benchmarks/global_allocation.py ... --only 'knapsack' --keeps 0.6
    python benchmarks/global_allocation.py --show

The protocol is that of `protocol.py`. Rows named `select` and `knapsack` are cut from one survey
that they share (its own row says what it cost), so that nothing but the ranks differs between
them; the other rows are whole runs of a recipe.

`select KEY` is the ablation of ZS-SVD's rule: zero-sum, smallest |dL|, most negative dL, smallest
singular value; `unordered` may drop any component of a target, not only its tail.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from protocol import FLOORS, Row, main, recipe_rows
from torch import Tensor, nn

from spectrim.allocate.ladder import Limits
from spectrim.allocate.zero_sum import KEYS, select
from spectrim.layers.lowrank import LowRankLinear
from spectrim.model.weights import get_module, read_bias, read_weight, replace_module
from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe
from spectrim.run.loading import LoadedModel
from spectrim.run.opening import open_job, other_bytes
from spectrim.run.planning import plan_from_survey
from spectrim.run.survey.survey import make_survey
from spectrim.run.survey.survey_key import survey_key
from spectrim.storage.survey_file import is_survey, load_factors, load_survey, save_survey
from spectrim.storage.survey_record import Survey

RESULTS = Path(__file__).parent / "results" / "global_allocation.json"
SURVEY = Path(tempfile.gettempdir()) / "spectrim-books-survey"
SCORES = ("energy", "first_order", "second_order", "kfac", "measured")
LIMITS = Limits(dtype_bytes=2)
BLOCK = get_recipe("spectrim-balanced").refine[0].model_dump(mode="json")
"""Block refinement as the default recipe has it, the same behind every plan."""


def recipes() -> dict[str, Recipe]:
    """Rows that are runs of a recipe."""
    zs, aa = get_recipe("zs-svd"), get_recipe("aa-svd")
    found = {"svd-llm uniform": get_recipe("svd-llm").with_changes(allocate=FLOORS)}
    for label, stages in (("one-shot", 1), ("1 correction", 2), ("5 corrections", 6)):
        step = {"step": "projected_gradient", "stages": stages}
        found[f"zs-svd {label}"] = zs.with_changes(refine=[step])
        found[f"zs-svd {label}, floor 0.3"] = zs.with_changes(
            refine=[step], allocate={"floor": 0.3}
        )
    found["zs-svd one-shot, faithful"] = zs.with_changes(refine=[], allocate={"faithful": True})
    found["kfac objective, knapsack"] = get_recipe("svd-llm").with_changes(
        decompose={"objective": "kfac"}, allocate={"rule": "knapsack", "score": "kfac"}
    )
    plans = {
        "uniform": {"rule": "uniform"},
        "zs-svd plan": {"rule": "zero_sum", "score": "first_order"},
        "second-order plan": {"rule": "knapsack", "score": "second_order"},
    }
    for label, allocate in plans.items():
        for suffix, refine in (("", []), (" + refined", [BLOCK])):
            found[f"{label} + anchored{suffix}"] = aa.with_changes(allocate=allocate, refine=refine)
    return found


def from_survey() -> dict[str, Row]:
    """Rows that are cut from the shared survey."""
    names = [f"select {key}" for key in KEYS]
    names += [f"select {key} unordered" for key in ("zero_sum", "magnitude", "negative")]
    names += [f"knapsack {score}" for score in SCORES]
    return {name: survey_row(name) for name in names}


def survey_row(name: str) -> Row:
    """A row that is cut from the shared survey."""

    def run(loaded: LoadedModel, calibration: Tensor, keep: float) -> dict[str, Any]:
        survey = load_survey(SURVEY)
        started = time.process_time()
        kept = kept_components(name, keep, survey)
        return {
            "dense_targets": sum(c is None for c in kept.values()),
            "kept": cut(loaded.model, survey, kept),
            "cpu_seconds": round(time.process_time() - started, 1),
        }

    return run


def shared_survey(loaded: LoadedModel, calibration: Tensor, keep: float) -> dict[str, Any]:
    """The survey behind the rows that only differ in their ranks; made once."""
    if not is_survey(SURVEY):
        recipe = get_recipe("zs-svd").with_changes(refine=[])
        job = open_job(loaded, recipe, text=calibration)
        made = make_survey(job, scores=SCORES[1:], complete=True)
        made = replace(
            made,
            key=survey_key(loaded, recipe, job.windows),
            model_name=loaded.name,
            other_bytes=other_bytes(loaded.model, job.anatomy, loaded.stored_dtype),
        )
        save_survey(made, SURVEY)
    return {"measured": False, "notes": list(load_survey(SURVEY).notes)}


def kept_components(name: str, keep: float, survey: Survey) -> dict[str, Tensor | None]:
    """Which components of every target a row keeps; None for a dense target."""
    kind, *words = name.split()
    if kind == "knapsack":
        plan = plan_from_survey(survey, keep=keep, rule="knapsack", score=words[0])
        return {e.name: None if e.rank is None else torch.arange(e.rank) for e in plan.entries}
    chosen = select(
        survey.curves, keep=keep, limits=LIMITS, key=words[0], ordered="unordered" not in words
    )
    kept = chosen.kept
    whole = [c.rank for c in survey.curves]
    return {
        c.name: None if len(k) == r else torch.as_tensor(k)
        for c, k, r in zip(survey.curves, kept, whole, strict=True)
    }


def cut(model: nn.Module, survey: Survey, kept: dict[str, Tensor | None]) -> float:
    """Replace the targets in place; returns the kept fraction of their numbers."""
    stored = dense = 0
    for name, components in kept.items():
        original = get_module(model, name)
        W = read_weight(original)
        dense += W.numel()
        if components is None:
            stored += W.numel()
            continue
        factors = load_factors(survey, name)
        up, down = factors.up[:, components], factors.down[components]
        stored += up.numel() + down.numel()
        options = {"dtype": W.dtype, "device": W.device}
        layer = LowRankLinear.from_factors(up, down, read_bias(original), **options)
        replace_module(model, name, layer)
    return stored / dense


if __name__ == "__main__":
    main(
        recipe_rows(recipes()) | from_survey(),
        results=RESULTS,
        description=__doc__,
        first={"survey": shared_survey},
    )
