"""Forwards of one block that pause at every group of targets and are resumed, never restarted.

Compressing a group shifts the inputs of the groups after it. A sequential pass therefore needs,
for every batch, the input of group 0, then (with group 0 replaced) the input of group 1, and so
on. Each batch's forward runs in a greenlet of its own that stops at the first target of a group:

    with Staged(block, groups) as staged:
        for key in batches:
            staged.start(key, lambda: replay.run(index, block, stream.read(key)))
        for group in groups:
            inputs = [staged.advance(key) for key in batches]
            staged.replace(group.targets[0], smaller)
        outputs = [staged.finish(key) for key in batches]

so that a block costs one forward per stream, however many groups it has.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from spectrim.model.anatomy import Group, Target
from spectrim.model.gate import Gate, Switches
from spectrim.model.weights import get_module, replace_module


@dataclass
class _Pause:
    """What a forward hands over when it stops in front of a group."""

    group: int
    x: Tensor


@dataclass
class _Forward:
    """One batch's forward: where it runs and which groups it has reached."""

    greenlet: greenlet
    reached: list[int] = field(default_factory=list)
    to_the_end: bool = False


class Staged:
    """Context manager that puts gates around a block's targets and runs its forwards in stages.

    Inside the context the block's submodules at the targets' paths are gates; use `module` to get
    at what they hold. On exit, also after an error, waiting forwards are ended and the gates are
    removed, with the modules that were put in by `replace` left in their places.

    Forwards run with the grad mode and autocast state that held at `start`. Everything has to
    happen on one thread.
    """

    def __init__(self, block: nn.Module, groups: Sequence[Group]):
        self._block = block
        self._groups = tuple(groups)
        self._gates: dict[str, Gate] = {}
        self._forwards: dict[Hashable, _Forward] = {}
        self._running: _Forward | None = None

    def __enter__(self) -> Staged:
        for group in self._groups:
            for target in group.targets:
                inner = get_module(self._block, target.projection)
                gate = Gate(inner, lambda x, index=group.index: self._arrive(index, x))
                self._gates[target.projection] = gate
        # Only now, when every path is known to exist, is anything changed.
        for projection, gate in self._gates.items():
            replace_module(self._block, projection, gate)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            for key in list(self._forwards):
                self._end(key)
        finally:
            for projection, gate in self._gates.items():
                replace_module(self._block, projection, gate.inner)
            self._gates.clear()

    def start(self, key: Hashable, call: Callable[[], Any]) -> None:
        """Prepare a forward; nothing runs before the first `advance`.

        Args:
            key: names the batch in the calls that follow.
            call: runs the block on this batch and returns its output.
        """
        if key in self._forwards:
            raise ValueError(f"a forward of batch {key!r} is under way already")
        switches = Switches.now()

        def body() -> Any:
            switches.restore()
            return call()

        forward = _Forward(greenlet(body))
        # Greenlets begin with an empty context; settings in context variables belong to the call.
        forward.greenlet.gr_context = contextvars.copy_context()
        self._forwards[key] = forward

    def advance(self, key: Hashable) -> Tensor:
        """Run a forward up to its next group and return that group's input.

        Returns:
            The live input tensor of the group, (B, T, in) or as the block shapes it, (..., in).

        Raises:
            RuntimeError: if the block ends, or reaches another group, before the next group.
        """
        forward = self._find(key)
        due = len(forward.reached)
        result = self._switch(key, forward)
        if not isinstance(result, _Pause):
            raise RuntimeError(f"batch {key!r} ended the block before group {due}")
        if due >= len(self._groups) or result.group != self._groups[due].index:
            raise RuntimeError(
                f"batch {key!r} reached group {result.group} as number {due}; the block runs its "
                "groups in another order than when it was traced"
            )
        return result.x

    def finish(self, key: Hashable) -> Any:
        """Run a forward to its end, past any groups that are left, and return its output."""
        forward = self._find(key)
        forward.to_the_end = True
        return self._switch(key, forward)

    def drop(self, key: Hashable) -> None:
        """End a waiting forward where it is; the batch may be started again."""
        self._find(key)
        self._end(key)

    def module(self, target: Target) -> nn.Module:
        """The module that a target's gate calls now."""
        return self._gates[target.projection].inner

    def replace(self, target: Target, module: nn.Module) -> nn.Module:
        """Make a target's gate call another module from now on; returns the one before."""
        gate = self._gates[target.projection]
        before, gate.inner = gate.inner, module
        return before

    def _find(self, key: Hashable) -> _Forward:
        if key not in self._forwards:
            raise KeyError(f"no forward of batch {key!r} is under way")
        return self._forwards[key]

    def _arrive(self, group: int, x: Tensor) -> None:
        """Called by every gate; stops the forward at the first target of a group."""
        forward = self._running
        if forward is None or getcurrent() is not forward.greenlet:
            return  # somebody calls the block directly: gates are transparent
        if forward.to_the_end or group in forward.reached:
            return
        forward.reached.append(group)
        own = Switches.now()
        waiting = forward.greenlet.parent
        assert waiting is not None  # `_switch` has set it
        waiting.switch(_Pause(group, x))
        own.restore()

    def _switch(self, key: Hashable, forward: _Forward, *, kill: bool = False) -> Any:
        """Let a forward run until it pauses or ends; the caller's switches stay as they are."""
        caller = Switches.now()
        # Results and errors go to the parent, which has to be whoever waits for them now.
        forward.greenlet.parent = getcurrent()
        before, self._running = self._running, forward
        try:
            return forward.greenlet.throw(GreenletExit) if kill else forward.greenlet.switch()
        finally:
            self._running = before
            caller.restore()
            if forward.greenlet.dead:
                self._forwards.pop(key, None)

    def _end(self, key: Hashable) -> None:
        """End a waiting forward, so that its `finally` clauses run and its tensors are freed."""
        forward = self._forwards[key]
        forward.to_the_end = True
        self._switch(key, forward, kill=True)
