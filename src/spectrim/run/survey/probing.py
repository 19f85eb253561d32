"""Cut one target at a time and see what the network says: measured KL and ASVD's sensitivities.

The stream holds the original network's states, so that a probe of a target runs the network only
from the target's block on. Cost: about half a forward pass over the windows per probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.model.anatomy import Target
from spectrim.model.losses import divergence, next_token
from spectrim.model.replay import Replay
from spectrim.model.tail import Loss
from spectrim.model.weights import get_module, replace_module
from spectrim.run.job import Job
from spectrim.run.parts.cutting import cut_layer
from spectrim.run.recorded import recorded
from spectrim.storage.survey_record import Factors

Ranks = Mapping[str, int]


def measured_divergences(
    job: Job, ids: Tensor, factors: Mapping[str, Factors], ranks: Ranks
) -> dict[str, float]:
    """Mean `KL(original || one target cut)` per token, nats, at one rank per target.

    The original's last hidden states are held, and its distribution follows from them.
    """
    replay = recorded(job, ids)
    reference = replay.stream.duplicate(job.options.streams)
    with torch.no_grad():
        for index in range(len(replay.names)):
            replay.advance(index, reference, job.batch, job.device)

    def loss(rows: slice) -> Loss:
        return divergence(replay.tail, reference.read(rows, job.device))

    probes = {name: [(None, rank)] for name, rank in ranks.items()}
    sums = _probe(job, replay, factors, probes, loss, "measure KL")
    return {name: total / ids.numel() for (name, _), total in sums.items()}


def measured_perplexities(
    job: Job, factors: Mapping[str, Factors], candidates: Mapping[str, Mapping[float, int]]
) -> dict[tuple[str, float], float]:
    """Perplexity of the first calibration windows with one target cut to each of its candidates.

    Args:
        job: the run; its recipe says on how many of its windows is measured.
        factors: of every target, to the largest candidate rank.
        candidates: target name -> keep -> rank.
    """
    ids = job.ids[: job.recipe.allocate.sensitivity_windows]
    own_ids = ids[job.team.share(len(ids))]

    def loss(rows: slice) -> Loss:
        return next_token(own_ids[rows])

    probes = {name: list(ranks.items()) for name, ranks in candidates.items()}
    sums = _probe(job, recorded(job, ids), factors, probes, loss, "measure perplexity")
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    job.log.notes.append(f"{len(sums)} evaluations of {predicted} tokens for the sensitivities")
    return {key: math.exp(total / predicted) for key, total in sums.items()}


def _rest(job: Job, replay: Replay, first: int, rows: slice) -> Tensor:
    """Last states from those that enter block `first`, through the blocks as they are now."""
    hidden = replay.stream.read(rows, job.device)
    for index in range(first, len(replay.names)):
        hidden = replay.run(index, replay.block(index), hidden)
    return hidden


@torch.no_grad()
def _probe(
    job: Job,
    replay: Replay,
    factors: Mapping[str, Factors],
    probes: Mapping[str, list[tuple[Any, int]]],
    loss_of: Callable[[slice], Loss],
    stage: str,
) -> dict[tuple[str, Any], float]:
    """Summed loss of the windows for every (target, key), each with only that target cut."""
    sums: dict[tuple[str, Any], float] = {}
    job.progress.start(stage, len(job.anatomy.blocks))
    with job.log.timed(stage):
        for block in job.anatomy.blocks:
            for target in block.targets:
                for key, rank in probes.get(target.name, ()):
                    with _cut(job.model, target, factors[target.name], rank):
                        sums[target.name, key] = sum(
                            _loss(replay, _rest(job, replay, block.index, rows), loss_of(rows))
                            for rows in replay.stream.batches(job.batch)
                        )
            replay.advance(block.index, replay.stream, job.batch, job.device)
            job.progress.advance(stage, block.name)
        totals = torch.tensor(list(sums.values()), dtype=torch.float64)
        job.team.sum_([totals])
    job.progress.finish(stage)
    return dict(zip(sums, totals.tolist(), strict=True))


def _loss(replay: Replay, hidden: Tensor, loss: Loss) -> float:
    return float(replay.tail.total(hidden, loss))


@contextmanager
def _cut(model: nn.Module, target: Target, factors: Factors, rank: int) -> Iterator[None]:
    """The model with one target at a rank, for the time of the context."""
    original = get_module(model, target.name)
    replace_module(model, target.name, cut_layer(original, factors, rank, balance=False))
    try:
        yield
    finally:
        replace_module(model, target.name, original)
