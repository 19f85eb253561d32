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
from functools import partial
from typing import Any

import torch
from torch import nn

from spectrim.allocate.plan import Plan
from spectrim.decompose.balance import balanced
from spectrim.layers.lowrank import LowRankLinear
from spectrim.model.anatomy import Block, Group, Target
from spectrim.model.staged import Staged
from spectrim.model.stream import Stream
from spectrim.model.weights import get_module, read_weight, replace_module
from spectrim.moments.experts import BlockMoments
from spectrim.moments.folded import Folded
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.refine.closed_form import update_up
from spectrim.run.cut.streams import Streams, gather_experts, gather_group
from spectrim.run.job import Job
from spectrim.run.parts.cutting import measured_error, replace_target, rounds_at_cut, stand_in
from spectrim.run.parts.passing import CUT
from spectrim.run.parts.sharing import cut_shared, owners_of
from spectrim.run.train.refining import refine


def _updated(
    state: Streams,
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


def _copied(block: Block, module: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a block to be cut; weights that will be cut away are the block's own."""
    cut = [t for t in block.targets if plan[t.name].rank is not None]
    weights = (p for t in cut for p in get_module(module, t.projection).parameters())
    return copy.deepcopy(module, {id(p): p for p in weights})


def _standing(staged: Staged, module: nn.Module, target: Target) -> nn.Module:
    """The original layer of a target, behind its gate if it has one."""
    if target.expert is None:
        return staged.module(target)
    return get_module(module, target.projection)


def _place(staged: Staged, compressed: nn.Module, target: Target, layer: nn.Module) -> None:
    """Put a layer where its original stood in the copy, behind its gate if it has one."""
    if target.expert is None:
        staged.replace(target, layer)
    else:
        replace_module(compressed, target.projection, layer)


def _make(
    state: Streams,
    plan: Plan,
    groups: Mapping[int, Group],
    found: BlockMoments,
    target: Target,
    original: nn.Module,
) -> tuple[nn.Module, dict[str, Any]]:
    """The layer of one target and its facts for the report."""
    moments = state.with_known(groups[target.group], found[target.group])
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


def _cut_block(state: Streams, plan: Plan, block: Block) -> tuple[nn.Module, Stream]:
    """Replace the block's targets in a copy; returns the copy and the original block's outputs."""
    job = state.job
    later = (e for e in plan.entries if e.converts and not rounds_at_cut(job.recipe, e))
    closes, inputs = state.closes and any(later), Folded[Moments]()
    module = get_module(job.model, block.name)
    compressed = _copied(block, module, plan)
    # Without training nothing asks for the original inputs again: outputs take their place.
    outputs = state.original
    if state.block_step is not None:
        outputs = Stream.empty(*outputs.shape, outputs.dtype, job.options.streams)
    paused = [stage[0] for stage in block.stages if stage[0].expert is None]
    with ExitStack() as stack:
        first = stack.enter_context(Staged(module, paused))
        second = stack.enter_context(Staged(compressed, paused))
        original_flow = stack.enter_context(state.flow(first, block, module, state.original))
        shifted_flow = None
        if state.stages_shifted:
            flow = state.flow(second, block, compressed, state.shifted)
            shifted_flow = stack.enter_context(flow)
        for groups in block.stages:
            if groups[0].expert is None:
                position = paused.index(groups[0])
                found = gather_group(state, position, groups[0], original_flow, shifted_flow)
            else:
                found = gather_experts(state, block, groups, module, compressed)
            targets = [target for group in groups for target in group.targets]
            cut_shared(
                job,
                owners_of(job.team, targets, plan),
                targets,
                partial(_standing, first, module),
                partial(_make, state, plan, {g.index: g for g in groups}, found),
                partial(_place, second, compressed),
            )
            if closes:
                for group in groups:
                    one = found[group.index]
                    inputs.put(group.targets[0].name, Moments(one.tokens, one.shifted))
        for rows in state.batches():
            outputs.write(rows, original_flow.output(rows))
            if shifted_flow is not None and state.block_step is None:
                state.shifted.write(rows, shifted_flow.output(rows))
    if closes:
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
            state = Streams(job, outputs)
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


def _finish_block(state: Streams, plan: Plan, block: Block) -> str:
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
    state.forget(block)
    return note


def _pass_by(job: Job, state: Streams | None, block: Block) -> str:
    """Put a block that was finished earlier into the model; both streams move past it."""
    if state is not None:
        module = get_module(job.model, block.name)
        state.move(block, module, state.original, state.original)
    job.keeper.restore(CUT, block)
    if state is not None:
        state.move(block, get_module(job.model, block.name), state.shifted, state.shifted)
    return f"{block.name} finished earlier"
