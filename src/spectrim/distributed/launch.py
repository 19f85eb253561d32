"""Join the other processes that torchrun has started, and leave them in order.

    with membership() as team:
        spectrim.compress(model, output="OUT", team=team)

run as `torchrun --nproc-per-node 4 script.py`. Without torchrun the team is this process alone.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

from spectrim.devices import HOST, accelerator, on_host
from spectrim.distributed.alarm import Alarm
from spectrim.distributed.placement import Placement, placement
from spectrim.distributed.team import Team
from spectrim.errors import InputError, LostRankError, SpectrimError

LONGEST_WAIT = timedelta(days=7)
"""One rank may compute for hours while the others wait; failures are told by the alarm instead."""

_MEMBERSHIPS = itertools.count(1)
"""A process may join more than once; each time the names in the shared store are new."""

_LOG = logging.getLogger(__name__)


def device_for(place: Placement, device: str = "auto") -> torch.device:
    """The device of one process among several: its own accelerator, or the CPU.

    Raises:
        InputError: more processes than accelerators on this machine, or one device for all.
    """
    kind, _, number = str(device).partition(":")
    other = accelerator()
    kinds = [HOST.type] if other is None else [other.type, HOST.type]
    works = f"auto, {' or '.join(kinds)}"
    if number:
        raise InputError(
            f"device {device!r} would be shared by {place.size} processes; give {works}, "
            "and every process takes the device of its number"
        )
    if kind not in ("auto", *kinds):
        raise InputError(f"several processes work on {works} here, not on {device!r}")
    if other is None or kind == HOST.type:
        return HOST
    count = torch.accelerator.device_count()
    if place.local_rank >= count:
        raise InputError(
            f"{place.local_rank + 1} or more processes were started on a machine with {count} "
            f"{other.type} devices; start torchrun with --nproc-per-node {count}, or give --device "
            f"{HOST}"
        )
    return torch.device(other.type, place.local_rank)


def membership(
    *,
    device: str = "auto",
    tell: Callable[[str], None] = _LOG.error,
) -> Membership:
    """Become a member of the team that the environment describes, for the time of a `with` block.

    An error that leaves the block on one rank ends all of them: the message is told once, by the
    leader, with the rank that failed.

    Args:
        device: `auto`, or a kind of device; every process takes its own.
        tell: says the message of a failure to the user.

    Raises:
        InputError: an incomplete environment, or too few devices.
    """
    return Membership(placement(), device, tell)


class Membership:
    """Context manager around the life of a process group; yields the team."""

    def __init__(self, place: Placement, device: str, tell: Callable[[str], None]):
        self._place, self._device, self._tell = place, device, tell
        self._alarm: Alarm | None = None

    def __enter__(self) -> Team:
        place = self._place
        if place.size == 1:
            return Team()
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        try:
            store, _, _ = next(rendezvous("env://", place.rank, place.size))
        except RuntimeError as error:
            raise LostRankError(
                f"rank {place.rank} of {place.size} cannot reach the other processes: {error}"
            ) from error
        shared = dist.PrefixStore(f"spectrim {next(_MEMBERSHIPS)}", store)
        self._alarm = Alarm(
            dist.PrefixStore("alarm", _own_connection(shared)),
            rank=place.rank,
            size=place.size,
            tell=self._tell,
        )
        self._alarm.watch()
        try:
            device = device_for(place, self._device)
        except InputError as error:
            self._alarm.sound(str(error))
            raise
        backend = dist.get_default_backend_for_device(HOST)
        if not on_host(device):
            torch.accelerator.set_device_index(device.index)
            own = dist.get_default_backend_for_device(device)
            backend = f"{HOST}:{backend},{device.type}:{own}"
        dist.init_process_group(
            backend,
            store=shared,
            rank=place.rank,
            world_size=place.size,
            timeout=LONGEST_WAIT,
        )
        return Team(place.rank, place.size, device)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._alarm is None:
            return
        import torch.distributed as dist

        if error is not None:
            if not isinstance(error, (SystemExit, KeyboardInterrupt)):
                self._alarm.sound(_in_words(error))
            self._alarm.stop()
            return
        # Nobody leaves while another one may still fail and want to be heard.
        try:
            Team(self._place.rank, self._place.size).barrier()
        except LostRankError as lost:
            self._alarm.sound(_in_words(lost))
            raise
        self._alarm.stop()
        dist.destroy_process_group()


def _own_connection(store: Any) -> Any:
    """The same store through another connection: waiting on one blocks it for other threads."""
    return store.clone() if hasattr(store, "clone") else store


def _in_words(error: BaseException) -> str:
    """A message of ours as it is; of others with the kind of error, which often says more."""
    text = " ".join(str(error).split())
    if isinstance(error, SpectrimError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
