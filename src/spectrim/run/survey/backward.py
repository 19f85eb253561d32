"""The backward pass of a run, with what the recipe says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from spectrim.decompose import OBJECTIVES
from spectrim.model.recompute import is_large
from spectrim.moments.gradients import GradientPass, gradient_pass
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.recipe import Decompose
from spectrim.run.job import Job
from spectrim.storage.shared_work import Piece

__all__ = ["backward_pass", "gathered_moments", "output_moments"]


def backward_pass(
    job: Job,
    choice: Decompose,
    *,
    needs: frozenset[str] | None = None,
    input_needs: frozenset[str] = frozenset(),
    windows: int | None = None,
    factors: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> GradientPass:
    """One forward and one backward over the first windows, all targets at once.

    Args:
        job: the run; its model is left as it is.
        choice: objective and clipping.
        needs: output statistics; by default those of the objective.
        input_needs: input statistics to collect on the way.
        windows: how many, by default all.
        factors: components to score.

    Raises:
        NonFiniteError: a gradient or the loss is not finite; names the target.
    """
    stage = "gradients"
    ids = job.ids if windows is None else job.ids[:windows]
    needs = (
        frozenset(OBJECTIVES[choice.objective].needs & {"G", "fisher"}) if needs is None else needs
    )
    mine = job.team.share(len(ids))
    job.progress.start(stage, mine.stop - mine.start)

    def advance(done: int) -> None:
        for _ in range(done):
            job.progress.advance(stage)

    result = gradient_pass(
        job.model,
        job.anatomy,
        ids,
        needs=needs,
        input_needs=input_needs,
        factors=factors,
        clip=choice.clip,
        batch=job.batch,
        seed=job.recipe.seed,
        checkpointing=is_large(job.model),
        on_batch=advance,
        team=job.team,
    )
    job.progress.finish(stage)
    return result


def gathered_moments(
    job: Job,
    choice: Decompose,
    *,
    input_needs: frozenset[str] = frozenset(),
    stage: str = "cut",
) -> tuple[dict[str, OutputMoments], dict[str, Moments]]:
    """Output moments of every target and input moments of every group, by their first target.

    Args:
        job: the run.
        choice: objective and clipping.
        input_needs: input statistics to collect on the way.
        stage: whose gradients these are; what an earlier run gathered for it is used again.
    """
    blocks = job.anatomy.blocks
    names = [f"{stage}-gradients-{block.index:03d}" for block in blocks]
    if not all(job.keeper.has(name) for name in names):
        result = backward_pass(job, choice, input_needs=input_needs)
        for block, name in zip(blocks, names, strict=True):
            held = [t.name for t in block.targets]
            outputs = {n: x for n, x in result.outputs.items() if n in held}
            inputs = {n: x for n, x in result.inputs.items() if n in held}
            job.keeper.save(name, *_flattened({"out": outputs, "in": inputs}))
        return result.outputs, result.inputs
    outputs, inputs = {}, {}
    for name in names:
        file, facts = job.keeper.load(name)
        outputs |= _restored(file, facts, "out", OutputMoments, job.device)
        inputs |= _restored(file, facts, "in", Moments, job.device)
    return outputs, inputs


def _flattened(records: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Tensor], dict]:
    """Tensors by `kind/name/field`, and the numbers beside them."""
    tensors, numbers = {}, {}
    for kind, found in records.items():
        for name, record in found.items():
            for field in fields(record):
                value = getattr(record, field.name)
                where = f"{kind}/{name}/{field.name}"
                if isinstance(value, Tensor):
                    tensors[where] = value
                else:
                    numbers[where] = value
    return tensors, numbers


def _restored(
    file: Piece,
    numbers: Mapping[str, Any],
    kind: str,
    record: type,
    device: torch.device,
) -> dict:
    values: dict[str, dict[str, Any]] = {}
    for where in (*file.entries, *numbers):
        found, name, field = where.split("/")
        if found == kind:
            value = numbers[where] if where in numbers else file.read(where).to(device)
            values.setdefault(name, {})[field] = value
    return {name: record(**given) for name, given in values.items()}


def output_moments(job: Job) -> dict[str, OutputMoments]:
    """Gradient moments of every target if the recipe's objective needs them, else nothing.

    What a survey has gathered already is used again.
    """
    choice = job.recipe.decompose
    if not OBJECTIVES[choice.objective].needs & {"G", "fisher"}:
        return {}
    if job.outputs is None:
        with job.log.timed("gradients"):
            job.outputs, _ = gathered_moments(job, choice)
    return job.outputs
