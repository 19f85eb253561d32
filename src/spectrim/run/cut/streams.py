"""The two streams of a sequential pass, and the moments of the groups that they reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor, nn

from spectrim.decompose import OBJECTIVES
from spectrim.model.anatomy import Block, Group
from spectrim.model.capture import capture_inputs
from spectrim.model.onload import give_back
from spectrim.model.pinning import Pins
from spectrim.model.replay import Replay
from spectrim.model.staged import Staged
from spectrim.model.stream import Stream
from spectrim.moments.accumulate import MomentAccumulator, accumulator_of
from spectrim.moments.experts import BlockMoments
from spectrim.moments.folded import Folded
from spectrim.moments.gradients import folded_dtype
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.moments.symmetric import reduction_dtype
from spectrim.recipe import BlockRefinement, ClosedFormRefinement
from spectrim.run.cut.flow import Flow, must_restart
from spectrim.run.job import Job
from spectrim.run.recorded import recorded

RETURNS = 4
"""Times that freed memory is returned while forwards go from one group to the next. What paused
forwards keep lies between what was freed; taking pages anew costs a few elementwise products."""


class Streams:
    """The two streams and what has to be known of them."""

    def __init__(self, job: Job, outputs: Mapping[str, OutputMoments] | None):
        self.job = job
        self.outputs = outputs or {}
        self.block_step = job.recipe.first(BlockRefinement)
        self.closed_step = job.recipe.first(ClosedFormRefinement)
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

    def carried(self, group: Group) -> str | None:
        """Where the stream is read that a group makes up for, as `Target.joins`; None if none."""
        carries = self.job.recipe.decompose.carry and "cross" in self.needs
        return group.targets[0].joins if carries and len(group.targets) == 1 else None

    def sums_of(self, group: Group) -> MomentAccumulator:
        """For the inputs of a group."""
        like, needs = folded_dtype(self.job.model), self.needs
        if self.carried(group) is not None:
            needs = needs - {"C", "cross"} | {"deficit"}
        return accumulator_of(group, needs, like=like, device=self.job.device)

    def with_known(self, group: Group, found: Moments) -> Moments:
        """Moments with those of the original inputs that the gradient pass has summed."""
        known = self.seen.get(group.targets[0].name)
        return found if known is None else replace(found, C=known.C)

    def forget(self, block: Block) -> None:
        """Let a finished block's moments go: while blocks are cut, what is kept of them grows."""
        for found in (self.outputs, self.seen):
            if isinstance(found, Folded):
                found.forget(t.name for t in block.targets)

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
        places = {place for group in block.groups if (place := self.carried(group))}
        noting = {place: module.get_submodule(place) for place in places}
        return Flow(staged, call, self.batches(), restarts=self.restarts, noting=noting)

    def lost(self, place: str, rows: slice, original: Flow, compressed: Flow) -> Tensor:
        """What the residual stream has lost on some rows where a group's output joins it."""
        if place:
            before, now = original.noted(place, rows), compressed.noted(place, rows)
        else:
            before, now = (s.read(rows, self.job.device) for s in (self.original, self.shifted))
        wide = reduction_dtype(before)
        return before.to(wide) - now.to(wide)


def gather_group(
    state: Streams, position: int, group: Group, original: Flow, compressed: Flow | None
) -> BlockMoments:
    """Advance both streams to the group and sum its moments, over all processes."""
    sums, place = state.sums_of(group), state.carried(group)
    W = original.weight_of(group.targets[0])
    batches = state.batches()
    for done, rows in enumerate(batches, 1):
        x = original.input_of(position, rows)
        x_shifted = None if compressed is None else compressed.input_of(position, rows)
        deficit = None
        if place is not None and compressed is not None and x_shifted is not None:
            lost = state.lost(place, rows, original, compressed)
            moved = (x.to(lost.dtype) - x_shifted) @ W.to(lost.dtype).mT
            deficit = moved.reshape(lost.shape) + lost
        sums.add(x, x_shifted, deficit)
        if done % -(-len(batches) // RETURNS) == 0:
            give_back()
    sums.reduce(state.job.team)
    return BlockMoments([group], {group.index: sums})


def gather_experts(
    state: Streams,
    block: Block,
    groups: Sequence[Group],
    module: nn.Module,
    compressed: nn.Module,
) -> BlockMoments:
    """Moments of one step of all experts, from forwards that send tokens where the original does.

    Which experts a batch reaches depends on its tokens, so no forward can wait at every expert:
    the block runs once more per stream and step instead.
    """
    sums = {group.index: state.sums_of(group) for group in groups}
    pins = Pins()
    for rows in state.batches():
        seen: list[dict[int, Tensor]] = [{}, {}]

        def note(into: dict[int, Tensor], group: Group, x: Tensor) -> None:
            into[group.index] = x

        with capture_inputs(module, groups, partial(note, seen[0])), pins.writing():
            state.forward(block, module, state.original, rows)
        if state.stages_shifted:
            with capture_inputs(compressed, groups, partial(note, seen[1])), pins.repeating():
                state.forward(block, compressed, state.shifted, rows)
        for index, x in seen[0].items():
            sums[index].add(x, seen[1][index] if state.stages_shifted else None)
    for one in sums.values():
        one.reduce(state.job.team)
    give_back()
    return BlockMoments(groups, sums)
