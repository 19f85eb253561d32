"""One pass over the original network: moments, decomposition and cut, block by block.

Cutting a block cannot change what later blocks see here, because the stream carries the original
network's hidden states (or is absent, for objectives without inputs). Memory is one block, its
moments and the stream. Several processes split the windows and share out the targets. A block
that an earlier run has cut is passed by the stream and taken from the work folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from spectrim.allocate.plan import Plan
from spectrim.decompose import OBJECTIVES
from spectrim.model.anatomy import Block, Target
from spectrim.model.replay import Replay
from spectrim.model.weights import get_module, replace_module
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.run.job import Job
from spectrim.run.parts.cutting import replace_target
from spectrim.run.parts.passing import CUT, advance, block_moments
from spectrim.run.parts.sharing import cut_shared, owners_of, spans
from spectrim.run.recorded import recorded


@torch.no_grad()
def cut_one_shot(job: Job, plan: Plan, outputs: Mapping[str, OutputMoments] | None = None) -> None:
    """Replace every target of the plan by its best rank-k layer, in place.

    Args:
        job: the run; its model is changed.
        plan: rank per target.
        outputs: gradient moments for objectives that need them.
    """
    needs = OBJECTIVES[job.recipe.decompose.objective].original
    stage = "compress"
    job.progress.start(stage, len(job.anatomy.blocks))
    unfinished = not job.keeper.all_finished(CUT, job.anatomy.blocks)
    with job.log.timed(stage):
        replay = recorded(job, job.ids) if needs and unfinished else None
        for span in spans(job, plan):
            with ExitStack() as stack:
                for block in span:
                    stack.enter_context(job.keeper.at_hand(block))
                _cut_span(job, plan, span, replay, needs, outputs or {})
            for block in span:
                job.progress.advance(stage, block.name)
    job.progress.finish(stage)


def _cut_span(
    job: Job,
    plan: Plan,
    span: Sequence[Block],
    replay: Replay | None,
    needs: frozenset[str],
    outputs: Mapping[str, OutputMoments],
) -> None:
    """Cut some blocks together, but for those that an earlier run has finished.

    A process keeps the moments of its own targets only.
    """
    owned = owners_of(job.team, [target for block in span for target in block.targets], plan)
    moments: dict[str, Callable[[], Moments]] = {}
    waiting: list[Block] = []
    for block in span:
        if job.keeper.is_finished(CUT, block):
            if replay is not None:
                advance(job, replay, block)
            job.keeper.restore(CUT, block)
            continue
        waiting.append(block)
        if replay is None:
            continue  # the objective has no inputs, and there is nothing to keep
        found = block_moments(job, replay, block, needs)
        mine = {t.name: t.group for t in block.targets if owned[t.name] == job.team.rank}
        found.keep(mine.values())
        moments |= {name: partial(found.__getitem__, group) for name, group in mine.items()}

    def make(target: Target, original: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        return replace_target(
            target,
            original,
            plan[target.name],
            job.recipe.decompose,
            moments[target.name]() if target.name in moments else None,
            outputs.get(target.name),
            balance=bool(job.recipe.refine),
        )

    cut_shared(
        job,
        owned,
        [target for block in waiting for target in block.targets],
        lambda target: get_module(job.model, target.name),
        make,
        lambda target, layer: replace_module(job.model, target.name, layer),
    )
    for block in waiting:
        job.keeper.finish(CUT, block)
