"""Two streams through the network, group by group, block by block.

Compressing one group shifts the inputs of the next, so both forwards of a block pause at every
group: moments are taken there, the group's targets are replaced in the compressed block, and the
forwards resume from where they paused. Every block is thus run once per stream, however many
groups it has. Refinement then trains the compressed block before its output becomes the shifted
stream of the next one. A block that an earlier run has finished only moves the streams: they are
computed again, in the same operations and so to the same bits, at the price of one forward each.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from spectrim.allocate.plan import Plan
from spectrim.decompose import OBJECTIVES
from spectrim.decompose.balance import balanced
from spectrim.layers.lowrank import LowRankLinear
from spectrim.model.anatomy import Block, Group, Target
from spectrim.model.onload import give_back
from spectrim.model.replay import Replay
from spectrim.model.staged import Staged
from spectrim.model.stream import Stream
from spectrim.model.weights import get_module, read_weight, replace_module
from spectrim.moments.accumulate import MomentAccumulator
from spectrim.moments.moments import Moments, OutputMoments, reduced
from spectrim.recipe import BlockRefinement, ClosedFormRefinement
from spectrim.refine.closed_form import update_up
from spectrim.run.cut.flow import Flow, must_restart
from spectrim.run.job import Job
from spectrim.run.parts.cutting import measured_error, replace_target, rounds_at_cut, stand_in
from spectrim.run.parts.passing import CUT
from spectrim.run.parts.sharing import cut_shared, owners_of
from spectrim.run.recorded import recorded
from spectrim.run.train.refining import refine

__all__ = ["cut_sequentially"]


RETURNS = 4
"""Times that freed memory is returned while forwards go from one group to the next. What paused
forwards keep lies between what was freed; taking pages anew costs a few elementwise products."""

Step = TypeVar("Step", bound=BaseModel)


def _first(job: Job, kind: type[Step]) -> Step | None:
    return next((step for step in job.recipe.refine if isinstance(step, kind)), None)


class _Pass:
    """The two streams and what has to be known of them."""

    def __init__(self, job: Job, outputs: Mapping[str, OutputMoments] | None):
        self.job = job
        self.outputs = outputs or {}
        self.block_step: BlockRefinement | None = _first(job, BlockRefinement)
        self.closed_step: ClosedFormRefinement | None = _first(job, ClosedFormRefinement)
        # Closed forms do not care how a product is split, gradient steps do.
        self.trains = any(not isinstance(s, ClosedFormRefinement) for s in job.recipe.refine)
        needs: set[str] = set(OBJECTIVES[job.recipe.decompose.objective].inputs)
        if "cross" in needs:
            needs |= {"C", "shifted"}
        if self.closed_step is not None:
            needs.add("shifted")
        self.closes = not self.trains and "shifted" in needs
        self.seen = job.inputs or {}
        # What the gradient pass has summed over the original inputs is not summed again.
        self.needs = frozenset(needs - {"C"} if self.seen else needs)
        self.replay: Replay = recorded(job, job.ids)
        self.original: Stream = self.replay.stream
        self.shifted: Stream = self.original.duplicate(job.options.streams)
        streams = 2 if self.stages_shifted else 1
        self.restarts = must_restart(job, self.original, streams=streams)
        if self.restarts:
            job.log.notes.append("forwards were begun anew at every group, to save memory")

    @property
    def stages_shifted(self) -> bool:
        """Whether moments need the shifted stream to pause at every group."""
        return "shifted" in self.needs

    def batches(self) -> list[slice]:
        """Rows of the streams that go through a block together."""
        return list(self.original.batches(self.job.batch))

    def forward(self, block: Block, module: nn.Module, stream: Stream, rows: slice) -> Tensor:
        """The block's output on some windows of a stream."""
        return self.replay.run(block.index, module, stream.read(rows, self.job.device))

    def move(self, block: Block, module: nn.Module, stream: Stream, into: Stream) -> None:
        """Write what a module makes of a stream into the same or another stream."""
        for rows in self.batches():
            into.write(rows, self.forward(block, module, stream, rows))

    def flow(self, staged: Staged, block: Block, module: nn.Module, stream: Stream) -> Flow:
        """The forwards of a module on a stream."""
        call = partial(self.forward, block, module, stream)
        return Flow(staged, call, self.batches(), restarts=self.restarts)


def _gather_group(state: _Pass, group: Group, original: Flow, compressed: Flow | None) -> Moments:
    """Advance both streams to the group and sum its moments, over all processes."""
    accumulator = MomentAccumulator(group.targets[0].name, state.needs)
    batches = state.batches()
    for done, rows in enumerate(batches, 1):
        x = original.input_of(group.index, rows)
        x_shifted = None if compressed is None else compressed.input_of(group.index, rows)
        accumulator.add(x, x_shifted)
        if done % -(-len(batches) // RETURNS) == 0:
            give_back()
    moments = reduced(accumulator.moments(), state.job.team)
    known = state.seen.get(accumulator.name)
    return moments if known is None else replace(moments, C=known.C)


def _updated(
    state: _Pass,
    target: Target,
    original: nn.Module,
    layer: nn.Module,
    moments: Moments,
    facts: dict[str, Any],
) -> nn.Module:
    """The layer with its up factor re-solved on the shifted inputs, if the recipe asks."""
    step = state.closed_step
    if step is None or moments.shifted is None or not isinstance(layer, LowRankLinear):
        return layer
    weight = read_weight(original)
    down = layer.down.weight.detach()
    up = update_up(weight, down, moments.shifted, name=target.name, ridge=step.ridge)
    if state.trains:
        up, down = balanced(up, down)
    updated = stand_in(original, up, down)
    facts["measured_error"] = measured_error(weight, updated, moments)
    return updated


def _make(
    state: _Pass, plan: Plan, moments: Moments, target: Target, original: nn.Module
) -> tuple[nn.Module, dict[str, Any]]:
    """The layer of one target and its facts for the report."""
    layer, facts = replace_target(
        target,
        original,
        plan[target.name],
        state.job.recipe.decompose,
        moments,
        state.outputs.get(target.name),
        balance=state.trains,
        at_once=rounds_at_cut(state.job.recipe, plan[target.name]),
    )
    return _updated(state, target, original, layer, moments, facts), facts


def _cut_block(state: _Pass, plan: Plan, block: Block) -> tuple[nn.Module, Stream]:
    """Replace the block's targets in a copy; returns the copy and the original block's outputs."""
    job = state.job
    inputs: dict[str, Moments] = {}
    module = get_module(job.model, block.name)
    compressed = copy.deepcopy(module)
    # Without training nothing asks for the original inputs again: outputs take their place.
    outputs = state.original
    if state.block_step is not None:
        outputs = Stream.empty(*outputs.shape, outputs.dtype, job.options.streams)
    with ExitStack() as stack:
        first = stack.enter_context(Staged(module, block.groups))
        second = stack.enter_context(Staged(compressed, block.groups))
        original_flow = state.flow(first, block, module, state.original)
        shifted_flow = (
            state.flow(second, block, compressed, state.shifted) if state.stages_shifted else None
        )
        for group in block.groups:
            moments = _gather_group(state, group, original_flow, shifted_flow)
            layers = cut_shared(
                job,
                plan,
                owners_of(job.team, group.targets, plan),
                [(target, first.module(target)) for target in group.targets],
                partial(_make, state, plan, moments),
            )
            for target in group.targets:
                second.replace(target, layers[target.name])
            inputs[group.targets[0].name] = moments
        for rows in state.batches():
            outputs.write(rows, original_flow.output(rows))
            if shifted_flow is not None and state.block_step is None:
                state.shifted.write(rows, shifted_flow.output(rows))
    later = (e for e in plan.entries if e.converts and not rounds_at_cut(job.recipe, e))
    if state.closes and any(later):
        job.finished_inputs.keep(block, inputs)
    return compressed, outputs


@torch.no_grad()
def cut_sequentially(
    job: Job, plan: Plan, outputs: Mapping[str, OutputMoments] | None = None
) -> None:
    """Compress block by block along the shifted stream, refining each block if asked, in place.

    Args:
        job: the run; its model is changed.
        plan: rank per target.
        outputs: gradient moments for objectives that need them.
    """
    stage = "compress"
    job.progress.start(stage, len(job.anatomy.blocks))
    state = None
    if not job.keeper.all_finished(CUT, job.anatomy.blocks):
        with job.log.timed("streams"):
            state = _Pass(job, outputs)
    for block in job.anatomy.blocks:
        with job.keeper.at_hand(block):
            if job.keeper.is_finished(CUT, block):
                with job.log.timed("streams"):
                    note = _pass_by(job, state, block)
            else:
                assert state is not None
                note = _finish_block(state, plan, block)
                job.keeper.finish(CUT, block)
        job.progress.advance(stage, note)
    job.progress.finish(stage)


def _finish_block(state: _Pass, plan: Plan, block: Block) -> str:
    """Cut and refine a block, put it into the model, and move both streams past it."""
    job, note = state.job, block.name
    with job.log.timed("factorise"):
        compressed, targets = _cut_block(state, plan, block)
    if state.block_step is not None:
        with job.log.timed("refine"):
            note = refine(
                job, state.replay, state.block_step, block, compressed, state.shifted, targets
            )
    if state.block_step is not None or not state.stages_shifted:
        state.move(block, compressed, state.shifted, state.shifted)
    replace_module(job.model, block.name, compressed)
    state.original = targets
    return note


def _pass_by(job: Job, state: _Pass | None, block: Block) -> str:
    """Put a block that was finished earlier into the model; both streams move past it."""
    if state is not None:
        module = get_module(job.model, block.name)
        state.move(block, module, state.original, state.original)
    job.keeper.restore(CUT, block)
    if state is not None:
        state.move(block, get_module(job.model, block.name), state.shifted, state.shifted)
    return f"{block.name} finished earlier"
