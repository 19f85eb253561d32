"""The whole run: windows, anatomy, plan, the recipe's flow, storage, report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.allocate.budget import Shape, keep_for_size, layer_bytes
from spectrim.allocate.curve import Curve
from spectrim.allocate.ladder import Limits, smallest_keep
from spectrim.allocate.plan import Plan
from spectrim.allocate.uniform import uniform
from spectrim.data.windows import Windows
from spectrim.errors import BudgetError, RecipeError
from spectrim.model.anatomy import Anatomy
from spectrim.model.tracing import trace
from spectrim.model.weights import check_model
from spectrim.recipe import Recipe
from spectrim.run.job import Job, Progress, RunLog, Silent
from spectrim.run.loading import LoadedModel
from spectrim.run.one_shot import cut_one_shot
from spectrim.run.refining import check_steps
from spectrim.run.reporting import build_report
from spectrim.run.sequential import cut_sequentially
from spectrim.run.texts import UserText, gather_windows
from spectrim.run.whole_network import carry_out, prepare

__all__ = ["Outcome", "run_recipe"]


@dataclass
class Outcome:
    """A compressed model in memory and what is known about it.

    Attributes:
        model: compressed in place.
        tokenizer: the original's.
        plan: as carried out.
        recipe: resolved.
        report: JSON-ready.
    """

    model: nn.Module
    tokenizer: Any
    plan: Plan
    recipe: Recipe
    report: dict[str, Any]


def shape_curves(anatomy: Anatomy) -> list[Curve]:
    """What a rule that needs no spectra has to know of the targets."""
    return [
        Curve(t.name, t.block, t.projection, Shape(t.out_features, t.in_features, t.bias))
        for t in anatomy.targets
    ]


def other_bytes(model: nn.Module, anatomy: Anatomy, dtype: torch.dtype) -> int:
    """Bytes of all parameters and buffers that are not targets, tied ones counted once."""
    inside = {f"{t.name}." for t in anatomy.targets}
    total = 0
    for name, p in model.named_parameters():
        if not any(name.startswith(prefix) for prefix in inside):
            total += p.numel() * dtype.itemsize
    return total


def _needs_windows(recipe: Recipe) -> bool:
    return not (
        recipe.decompose.objective == "plain"
        and recipe.allocate.rule == "uniform"
        and not recipe.refine
        and recipe.learn is None
    )


def plan_limits(recipe: Recipe, dtype_bytes: int) -> Limits:
    """What the recipe allows a plan to contain."""
    return Limits(
        dtype_bytes=dtype_bytes, floor=recipe.allocate.floor, multiple=recipe.allocate.multiple
    )


def make_plan(job: Job, dtype_bytes: int) -> Plan:
    """Ranks by the recipe's rule."""
    rule = job.recipe.allocate
    if rule.rule == "uniform":
        return uniform(
            shape_curves(job.anatomy),
            keep=job.recipe.keep,
            limits=plan_limits(job.recipe, dtype_bytes),
            fill=rule.fill,
        )
    raise RecipeError(f"the rule {rule.rule!r} is not available in this flow")


def run_recipe(
    loaded: LoadedModel,
    recipe: Recipe,
    *,
    text: UserText = None,
    size: int | None = None,
    plan: Plan | None = None,
    progress: Progress | None = None,
    offload_streams: Path | None = None,
    on_failure: str = "error",
) -> Outcome:
    """Compress a loaded model in place.

    Args:
        loaded: the model; its parameters are replaced.
        recipe: resolved, with its keep.
        text: the user's calibration text, None for the recipe's.
        size: bytes of the whole checkpoint to reach, in place of the recipe's keep.
        plan: ranks to use instead of the recipe's rule.
        progress: told of every block.
        offload_streams: folder for memory-mapped streams.
        on_failure: `error` or `keep-unrefined`.

    Raises:
        SpectrimError: anything that keeps the run from an honest result.
    """
    model, log = loaded.model, RunLog()
    check_steps(recipe)
    check_model(model)
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    anatomy = trace(model, torch.arange(8)[None].to(device) % vocabulary)
    dtype_bytes = loaded.stored_dtype.itemsize
    other = other_bytes(model, anatomy, loaded.stored_dtype)
    if size is not None:
        recipe = recipe.with_changes(keep=_keep_for(size, recipe, anatomy, other, dtype_bytes))
    windows: Windows | None = None
    if _needs_windows(recipe):
        with log.timed("windows"):
            windows = gather_windows(loaded, recipe.calibration, text, seed=recipe.seed)
    job = Job(
        model=model,
        anatomy=anatomy,
        windows=windows,
        recipe=recipe,
        device=device,
        progress=progress or Silent(),
        log=log,
        offload_streams=offload_streams,
        on_failure=on_failure,
    )
    chosen = plan or make_plan(job, dtype_bytes)
    _check_plan(chosen, anatomy)
    if any(e.rank is not None for e in chosen.entries):
        steps = prepare(job)
        if recipe.flow == "sequential":
            cut_sequentially(job, chosen)
        else:
            cut_one_shot(job, chosen)
        carry_out(job, steps)
    else:
        log.notes.append("every target stays dense at this keep: nothing was cut or refined")
    model.to(loaded.stored_dtype)
    report = build_report(
        model_name=loaded.name,
        recipe=recipe,
        plan=chosen,
        windows=windows,
        log=log,
        shapes={t.name: (t.out_features, t.in_features) for t in anatomy.targets},
        other_bytes=other,
        left_alone=anatomy.left_alone,
    )
    return Outcome(model, loaded.tokenizer, chosen, recipe, report)


def _keep_for(size: int, recipe: Recipe, anatomy: Anatomy, other: int, dtype_bytes: int) -> float:
    curves, limits = shape_curves(anatomy), plan_limits(recipe, dtype_bytes)
    dense = sum(
        layer_bytes(c.shape, rank=None, storage="dense", dtype_bytes=dtype_bytes) for c in curves
    )
    return keep_for_size(
        size,
        other_bytes=other,
        targets_dense_bytes=dense,
        smallest_keep=smallest_keep(curves, limits),
    )


def _check_plan(plan: Plan, anatomy: Anatomy) -> None:
    """A plan must name exactly this model's targets."""
    planned, found = {e.name for e in plan.entries}, {t.name for t in anatomy.targets}
    if planned != found:
        odd = sorted(planned ^ found)
        raise BudgetError(
            f"the plan is for another model: {len(odd)} targets do not match, {odd[0]!r} first"
        )
