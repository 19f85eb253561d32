"""Cut one target at a time and see what the network says: measured KL and ASVD's sensitivities.

One pass over the blocks serves many probes. Where the block of a target is reached, the target is
cut; the states that leave the block then go on through the untouched blocks behind, together with
those of the probes begun before, and meet norm and head at the end. A probe costs about half a
forward pass over the windows, and every block is read once for all that go on together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.model.anatomy import Block, Target
from spectrim.model.losses import kl_per_token, next_token
from spectrim.model.replay import Replay
from spectrim.model.stream import Stream
from spectrim.model.weights import get_module, replace_module
from spectrim.run.job import Job
from spectrim.run.parts.cutting import cut_layer
from spectrim.run.parts.passing import advance
from spectrim.run.recorded import recorded
from spectrim.storage.survey_record import Factors

TOGETHER = 2**30
"""Bytes of hidden states of the probes that go on together."""


@dataclass(frozen=True)
class Probe:
    """One target cut to one rank; `key` tells the probes of a target apart."""

    block: Block
    target: Target
    key: Any
    rank: int


@dataclass
class UnderWay:
    """Hidden states of probes that go on together, each with all windows.

    Attributes:
        stream: (probes · windows, T, d).
        windows: of this process.
        begun: probes whose blocks were reached.
    """

    stream: Stream
    windows: int
    begun: int = 0

    def rows(self, probe: int, rows: slice) -> slice:
        """Where some windows of a probe lie."""
        first = probe * self.windows
        return slice(first + rows.start, first + rows.stop)


Judge = Callable[[Replay, UnderWay], list[float]]
"""Last states of some probes -> the summed loss of each."""


def measured_divergences(
    job: Job, ids: Tensor, factors: Mapping[str, Factors], ranks: Mapping[str, int]
) -> dict[str, float]:
    """Mean `KL(original || one target cut)` per token, nats, at one rank per target.

    Args:
        job: the run; its model is as it was afterwards.
        ids: windows, (N, T).
        factors: of every target, to its rank at least.
        ranks: by target; others are not probed.
    """
    replay = recorded(job, ids)
    last = replay.stream.duplicate(job.options.streams)
    for block in job.anatomy.blocks:
        with job.keeper.at_hand(block):
            replay.advance(block.index, last, job.batch, job.device)

    def judge(replay: Replay, found: UnderWay) -> list[float]:
        sums = [0.0] * found.begun
        for rows in last.batches(job.batch):
            teacher = last.read(rows, job.device)
            for some, positions in replay.tail.pieces(teacher):
                expected = replay.tail.logits(teacher[some, positions])
                for probe in range(found.begun):
                    states = found.stream.read(found.rows(probe, rows), job.device)
                    logits = replay.tail.logits(states[some, positions])
                    sums[probe] += float(kl_per_token(expected, logits).sum())
        return sums

    probes = {name: [(None, rank)] for name, rank in ranks.items()}
    sums = _probe(job, replay, factors, probes, judge, "measure KL")
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

    def judge(replay: Replay, found: UnderWay) -> list[float]:
        def loss(probe: int, rows: slice) -> float:
            states = found.stream.read(found.rows(probe, rows), job.device)
            return float(replay.tail.total(states, next_token(own_ids[rows])))

        batches = [*replay.stream.batches(job.batch)]
        return [sum(loss(probe, rows) for rows in batches) for probe in range(found.begun)]

    probes = {name: list(ranks.items()) for name, ranks in candidates.items()}
    replay = recorded(job, ids)
    sums = _probe(job, replay, factors, probes, judge, "measure perplexity")
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    job.log.notes.append(f"{len(sums)} evaluations of {predicted} tokens for the sensitivities")
    return {key: math.exp(total / predicted) for key, total in sums.items()}


@torch.no_grad()
def _probe(
    job: Job,
    replay: Replay,
    factors: Mapping[str, Factors],
    wanted: Mapping[str, Sequence[tuple[Any, int]]],
    judge: Judge,
    stage: str,
) -> dict[tuple[str, Any], float]:
    """Summed loss of the windows for every (target, key), each with only that target cut."""
    blocks = job.anatomy.blocks
    probes = [
        Probe(block, target, key, rank)
        for block in blocks
        for target in block.targets
        for key, rank in wanted.get(target.name, ())
    ]
    windows, tokens, width = replay.stream.shape
    size = max(1, windows * tokens * width * replay.stream.dtype.itemsize)
    # The same on all ranks, whose windows may differ by one.
    together = min(job.team.gather(max(1, TOGETHER // size)))
    parts = [probes[i : i + together] for i in range(0, len(probes), together)]
    job.progress.start(stage, sum(len(blocks) - part[0].block.index for part in parts))
    sums: list[float] = []
    passed = 0
    with job.log.timed(stage):
        for part in parts:
            for block in blocks[passed : part[0].block.index]:
                with job.keeper.at_hand(block):
                    advance(job, replay, block)
            passed = part[0].block.index
            sums += judge(replay, _run_together(job, replay, part, factors, stage))
        totals = torch.tensor(sums, dtype=torch.float64)
        job.team.sum_([totals])
    job.progress.finish(stage)
    keys = [(probe.target.name, probe.key) for probe in probes]
    return dict(zip(keys, totals.tolist(), strict=True))


def _run_together(
    job: Job, replay: Replay, probes: Sequence[Probe], factors: Mapping[str, Factors], stage: str
) -> UnderWay:
    """Last states of some probes; the replay's stream stays in front of the first one's block."""
    windows, tokens, width = replay.stream.shape
    original = replay.stream.duplicate(job.options.streams)
    room = Stream.empty(len(probes) * windows, tokens, width, original.dtype, job.options.streams)
    found = UnderWay(room, windows)
    for block in job.anatomy.blocks[probes[0].block.index :]:
        with job.keeper.at_hand(block):
            begun = room.leading(found.begun * windows)
            replay.advance(block.index, begun, job.batch, job.device)
            for probe in (probe for probe in probes if probe.block is block):
                with _cut(job.model, probe.target, factors[probe.target.name], probe.rank):
                    _begin(job, replay, original, found, block)
            replay.advance(block.index, original, job.batch, job.device)
        job.progress.advance(stage, block.name)
    return found


def _begin(job: Job, replay: Replay, original: Stream, found: UnderWay, block: Block) -> None:
    """Let the states that enter a block leave it, as it is now, as those of the next probe."""
    for rows in original.batches(job.batch):
        entering = original.read(rows, job.device)
        leaving = replay.run(block.index, replay.block(block.index), entering)
        found.stream.write(found.rows(found.begun, rows), leaving)
    found.begun += 1


@contextmanager
def _cut(model: nn.Module, target: Target, factors: Factors, rank: int) -> Iterator[None]:
    """The model with one target at a rank, for the time of the context."""
    original = get_module(model, target.name)
    replace_module(model, target.name, cut_layer(original, factors, rank, balance=False))
    try:
        yield
    finally:
        replace_module(model, target.name, original)
