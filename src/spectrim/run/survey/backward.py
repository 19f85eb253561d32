"""The backward pass of a run, with what the recipe says about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from spectrim.decompose import OBJECTIVES
from spectrim.model.anatomy import Block
from spectrim.model.recompute import is_large
from spectrim.moments.gradients import gradient_pass
from spectrim.moments.gradients_by_block import gradients_by_block
from spectrim.moments.moments import Moments, OutputMoments, Record
from spectrim.moments.target_sums import ComponentsOf, GradientPass
from spectrim.recipe import Decompose
from spectrim.run.job import Job
from spectrim.run.recorded import recorded
from spectrim.storage.shared_work import Piece

__all__ = ["backward_pass", "by_block", "gathered_moments", "output_moments"]


def backward_pass(
    job: Job,
    choice: Decompose,
    *,
    needs: frozenset[str] | None = None,
    input_needs: frozenset[str] = frozenset(),
    windows: int | None = None,
    factors: ComponentsOf | None = None,
) -> Iterator[tuple[Block, GradientPass]]:
    """Gradients of the first windows, block by block, all targets of a block at once.

    Small models in memory take one forward and one backward for all blocks; others go block by
    block from the last to the first, with as much in memory as one block needs.

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
    options = {
        "needs": needs,
        "input_needs": input_needs,
        "factors": factors,
        "clip": choice.clip,
        "batch": job.batch,
        "team": job.team,
    }
    if by_block(job):
        job.progress.start(stage, 2 * len(job.anatomy.blocks))
        yield from gradients_by_block(
            recorded(job, ids),
            job.anatomy,
            ids,
            at_hand=job.keeper.at_hand,
            device=job.device,
            folder=job.offload_streams,
            on_block=lambda: job.progress.advance(stage),
            **options,
        )
    else:
        mine = job.team.share(len(ids))
        job.progress.start(stage, mine.stop - mine.start)

        def advance(done: int) -> None:
            for _ in range(done):
                job.progress.advance(stage)

        whole = gradient_pass(job.model, job.anatomy, ids, on_batch=advance, **options)
        for block in job.anatomy.blocks:
            yield block, whole.of(block)
    job.progress.finish(stage)


def by_block(job: Job) -> bool:
    """Whether gradients are taken one block at a time: the model is large or not in memory."""
    return job.keeper.onloader is not None or is_large(job.model)


def gathered_moments(
    job: Job,
    choice: Decompose,
    *,
    input_needs: frozenset[str] = frozenset(),
    stage: str = "cut",
) -> tuple[Mapping[str, OutputMoments], Mapping[str, Moments]]:
    """Output moments of every target and input moments of every group, by their first target.

    Of a model that is large or not in memory they lie in the work folder, where there is one, and
    are read when they are asked for.

    Args:
        job: the run.
        choice: objective and clipping.
        input_needs: input statistics to collect on the way.
        stage: whose gradients these are; what an earlier run gathered for it is used again.
    """
    blocks, keeper = job.anatomy.blocks, job.keeper
    names = {block.index: f"{stage}-gradients-{block.index:03d}" for block in blocks}
    lies = by_block(job) and keeper.work is not None
    outputs: dict[str, OutputMoments] = {}
    inputs: dict[str, Moments] = {}
    if not all(keeper.has(name) for name in names.values()):
        for block, found in backward_pass(job, choice, input_needs=input_needs):
            if not keeper.has(names[block.index]):
                keeper.save(
                    names[block.index], *_flattened({"out": found.outputs, "in": found.inputs})
                )
            if not lies:
                outputs |= found.outputs
                inputs |= found.inputs
            del found  # before the next block's moments are gathered
    elif not lies:
        for name in names.values():
            file, numbers = keeper.load(name)
            outputs |= _restored(file, numbers, "out", OutputMoments, job.device)
            inputs |= _restored(file, numbers, "in", Moments, job.device)
    if not lies:
        return outputs, inputs
    return KeptMoments(job, names, "out", OutputMoments), KeptMoments(job, names, "in", Moments)


class KeptMoments(Mapping[str, Record]):
    """Moments in the work folder, by target; read when one is asked for.

    Its names are those of all targets (inputs: of every group's first), gathered or not.
    """

    def __init__(self, job: Job, pieces: Mapping[int, str], kind: str, record: type[Record]):
        self._keeper, self._device = job.keeper, job.device
        self._kind, self._record = kind, record
        self._pieces = {
            target.name: pieces[block.index]
            for block in job.anatomy.blocks
            for group in block.groups
            for target in (group.targets if kind == "out" else group.targets[:1])
        }

    def __getitem__(self, name: str) -> Record:
        file, numbers = self._keeper.load(self._pieces[name])
        found = _restored(file, numbers, self._kind, self._record, self._device, only=name)
        return found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


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
    record: type[Record],
    device: torch.device,
    *,
    only: str | None = None,
) -> dict[str, Record]:
    """Records of a piece as `_flattened` took them apart; all of them or one."""
    values: dict[str, dict[str, Any]] = {}
    for where in (*file.entries, *numbers):
        found, name, field = where.split("/")
        if found == kind and only in (None, name):
            value = numbers[where] if where in numbers else file.read(where).to(device)
            values.setdefault(name, {})[field] = value
    return {name: record(**given) for name, given in values.items()}


def output_moments(job: Job) -> Mapping[str, OutputMoments]:
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
