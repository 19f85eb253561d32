"""One stream's way through a block: paused at every group, or begun again for every group.

A paused forward holds its activations, and all batches pause at the same group, so that pausing
costs memory in proportion to the calibration windows: about one block's activations of all of
them. Where that is too much, forwards are begun anew for every group and only their inputs are
held, at about two and a half times the work of the block's forwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from spectrim.devices import free_memory
from spectrim.model.anatomy import Block, Target
from spectrim.model.capture import first_tensor
from spectrim.model.staged import Staged
from spectrim.model.stream import Stream
from spectrim.model.weights import read_weight
from spectrim.run.job import Job

SHARE_FOR_PAUSED = 0.5
"""Paused forwards may take this share of an accelerator's free memory."""


class Flow:
    """The forwards of one module on all batches of one stream; a context manager.

    Args:
        staged: gates around the module's groups.
        call: rows of the stream -> the block's output on them.
        batches: all rows.
        restarts: begin anew for every group instead of pausing.
        noting: modules whose inputs are to be known to `noted`, by a name.
    """

    def __init__(
        self,
        staged: Staged,
        call: Callable[[slice], Tensor],
        batches: Sequence[slice],
        *,
        restarts: bool,
        noting: Mapping[str, nn.Module] | None = None,
    ):
        self._staged = staged
        self._call = call
        self._restarts = restarts
        self._latest: dict[str, Tensor] = {}
        self._noted: dict[tuple[str, int], Tensor] = {}
        self._handles = [
            module.register_forward_pre_hook(partial(self._note, name), with_kwargs=True)
            for name, module in (noting or {}).items()
        ]
        if not restarts:
            for rows in batches:
                staged.start(rows.start, partial(call, rows))

    def input_of(self, position: int, rows: slice) -> Tensor:
        """What the block's group at this position reads from some rows; positions come in order."""
        key = rows.start
        if self._restarts:
            self._noted.clear()  # the next group's forwards pass there again
            self._staged.start(key, partial(self._call, rows))
            for _ in range(position):
                self._staged.advance(key)
        x = self._staged.advance(key)
        if self._restarts:
            self._staged.drop(key)
        self._noted |= {(name, key): tensor for name, tensor in self._latest.items()}
        self._latest.clear()
        return x

    def noted(self, name: str, rows: slice) -> Tensor:
        """What has entered a module on some rows, after they have passed it; asked for once."""
        return self._noted.pop((name, rows.start))

    def weight_of(self, target: Target) -> Tensor:
        """The weight (out, in) of what stands at a target now."""
        return read_weight(self._staged.module(target))

    def __enter__(self) -> Flow:
        return self

    def __exit__(self, *_: object) -> None:
        """Note nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._noted.clear()

    def _note(self, name: str, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._latest[name] = first_tensor(args, kwargs).detach()

    def output(self, rows: slice) -> Tensor:
        """The block's output on some rows."""
        return self._call(rows) if self._restarts else self._staged.finish(rows.start)


def paused_bytes(block: Block, stream: Stream) -> int:
    """About what all windows hold at most while they pause in a block.

    The residual and the normalised input, the group's input, and what the group before it gave.
    """
    windows, tokens, width = stream.shape
    held, before = 0, 0
    for group in block.groups:
        held = max(held, group.in_features + before)
        before = sum(target.out_features for target in group.targets)
    return windows * tokens * stream.dtype.itemsize * (2 * width + held)


def must_restart(job: Job, stream: Stream, *, streams: int) -> bool:
    """Whether pausing would take too much memory: the run's room, streams on disk, an accelerator.

    Args:
        job: the run.
        stream: one of the streams, before the first block.
        streams: how many pause at the same time.
    """
    if job.room.restarts or job.options.streams is not None:
        return True
    free = free_memory(job.device)
    if free is None:
        return False
    needed = streams * max(paused_bytes(block, stream) for block in job.anatomy.blocks)
    return needed > SHARE_FOR_PAUSED * free
