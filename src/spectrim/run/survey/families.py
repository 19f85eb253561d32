"""What a predicted nat is worth: one measured divergence per family of forms, at the size wanted.

Losses are predicted one target at a time. Errors of rounding are noise and add up about so; cutting
takes the same directions away everywhere, and adds up to more, the more is cut. Where a plan weighs
one against the other, each family makes a plan of its own for this size, the model is stored so,
and the divergence of its predictions from the original's is held against the predicted loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectrim.allocate.forms import Form, rounded_loss
from spectrim.allocate.knapsack import CUTTING, ROUNDING, knapsack
from spectrim.allocate.plan import Plan
from spectrim.errors import BudgetError
from spectrim.layers.layout import layout_of
from spectrim.model.weights import get_module, replace_module
from spectrim.moments.moments import Moments
from spectrim.run.job import Job
from spectrim.run.parts.cutting import source_of
from spectrim.run.parts.passing import block_moments
from spectrim.run.planning import plan_limits
from spectrim.run.recorded import recorded
from spectrim.storage.survey_file import load_factors
from spectrim.storage.survey_record import Survey

WINDOWS = 16
"""Windows behind each divergence."""


@torch.no_grad()
def measured_scale(job: Job, survey: Survey) -> dict[str, float]:
    """What a predicted nat of `cutting` and of `rounding` is worth at the recipe's keep.

    A family that cannot reach the size has no number: rounding then counts as predicted, and
    cutting too. Models that are not in memory, and runs of several processes, are not measured;
    a note says so.
    """
    if job.keeper.onloader is not None or job.team.size > 1:
        job.log.notes.append(
            "predicted losses of cutting and of rounding were taken as they are: they are measured "
            "for models in memory, by one process"
        )
        return {}
    limits = plan_limits(job.recipe, job.dtype_bytes)
    if not limits.forms:
        return {}
    families = {ROUNDING: limits.whole, CUTTING: limits.forms}
    plans = {name: plan for name, f in families.items() if (plan := _plan(job, survey, f))}
    with job.log.timed("families"):
        layers = _layers(job, survey, plans)
        found = {name: _divergence(job, layers[name]) for name in plans}
    scale = {ROUNDING: 1.0, CUTTING: 1.0}
    if ROUNDING in plans:
        predicted = plans[ROUNDING].predicted_loss or 0.0
        scale[ROUNDING] = found[ROUNDING] / predicted if predicted > 0 else 1.0
    if CUTTING in plans:
        rounded = _rounded_share(survey, plans[CUTTING])
        cut = (plans[CUTTING].predicted_loss or 0.0) - rounded
        left = found[CUTTING] - scale[ROUNDING] * rounded
        # A factor below that of rounding would say that noise adds up to more than bias.
        scale[CUTTING] = max(left / cut, scale[ROUNDING]) if cut > 0 else 1.0
    job.log.notes.append(
        "a predicted nat was measured as "
        + " and ".join(f"{scale[name]:.2f} of {name}" for name in (CUTTING, ROUNDING))
    )
    return scale


def _plan(job: Job, survey: Survey, forms: Sequence[Form]) -> Plan | None:
    """The best plan at the recipe's keep among some forms, None if they cannot reach it."""
    try:
        return knapsack(
            survey.curves_for("kfac"),
            keep=job.recipe.keep,
            limits=plan_limits(job.recipe, job.dtype_bytes),
            score="kfac",
            forms=forms,
        )
    except BudgetError:
        return None


def _rounded_share(survey: Survey, plan: Plan) -> float:
    """How much of a plan's predicted loss comes from rounding."""
    return sum(rounded_loss(curve, plan[curve.name]) for curve in survey.curves)


def _layers(job: Job, survey: Survey, plans: Mapping[str, Plan]) -> dict[str, dict[str, nn.Module]]:
    """Family -> target -> its stored layer, on the original stream."""
    made: dict[str, dict[str, nn.Module]] = {name: {} for name in plans}
    replay = recorded(job, job.ids)
    job.progress.start("families", len(job.anatomy.blocks))
    for block in job.anatomy.blocks:
        moments = block_moments(job, replay, block, frozenset({"C"}))
        for target in block.targets:
            for name, plan in plans.items():
                layer = _layer(job, survey, plan, target, moments[target.group])
                if layer is not None:
                    made[name][target.name] = layer
        job.progress.advance("families", block.name)
    job.progress.finish("families")
    return made


def _layer(job: Job, survey: Survey, plan: Plan, target: Any, moments: Moments) -> Any:
    entry = plan[target.name]
    if entry.rank is None and entry.weights == "native":
        return None
    original = get_module(job.model, target.name)
    factors = None
    if entry.components is not None:
        up, down = load_factors(survey, target.name).cut(entry.components)
        factors = (up.double(), down.double())
    output = None if job.outputs is None else job.outputs[target.name]
    source = source_of(target, original, job.recipe.decompose, moments, output, factors)
    kind = layout_of(entry.storage).layer_class()
    dtype = source_dtype(original)
    layer = kind.stored(source, entry.rank, entry.weights, dtype=dtype)
    return layer.train(original.training)


def source_dtype(original: nn.Module) -> torch.dtype:
    """The dtype that a layer works in."""
    return next(original.parameters()).dtype


def _divergence(job: Job, layers: Mapping[str, nn.Module]) -> float:
    """Mean KL from the original's predictions, nats per token."""
    ids = job.ids[: min(WINDOWS, job.ids.shape[0])]
    total = 0.0
    for batch in ids.split(job.batch):
        batch = batch.to(job.device)
        reference = _log_probabilities(job.model, batch)
        with _swapped(job.model, layers):
            changed = _log_probabilities(job.model, batch)
        total += float(F.kl_div(changed, reference, reduction="sum", log_target=True))
    return total / ids.numel()


def _log_probabilities(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)


@contextmanager
def _swapped(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with some layers in the place of its own, for the time of the context."""
    originals = {name: get_module(model, name) for name in layers}
    try:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        yield
    finally:
        for name, original in originals.items():
            replace_module(model, name, original)
