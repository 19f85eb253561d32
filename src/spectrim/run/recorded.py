"""A run's model, recorded with this process's part of some windows."""

from __future__ import annotations

from torch import Tensor

from spectrim.model.replay import Replay, record
from spectrim.model.stream import Stream
from spectrim.run.job import Job


def recorded(job: Job, ids: Tensor) -> Replay:
    """The model as it is now, and the states that enter its first block.

    Args:
        job: the run.
        ids: windows of all processes, (N, T); there may be fewer of them than processes.
    """
    own = ids[job.team.share(len(ids))]
    replay = record(
        job.model,
        own if len(own) else ids[:1],
        batch=job.batch,
        device=job.device,
        anatomy=job.anatomy,
        folder=job.options.streams,
    )
    if not len(own):
        _, tokens, width = replay.stream.shape
        replay.stream = Stream.empty(0, tokens, width, replay.stream.dtype)
    return replay
