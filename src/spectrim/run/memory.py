"""How much memory this machine has left, and whether a model has to stay out of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spectrim.arguments import refuse_unused
from spectrim.devices import free_memory, on_host, whole_memory
from spectrim.errors import InputError
from spectrim.run.loading import read_config
from spectrim.run.options import RunOptions
from spectrim.run.working import resolve_device, resolve_dtype, stored_dtype
from spectrim.storage.shards import Shards
from spectrim.storage.weight_files import INDEX_FILE, WEIGHTS_FILE

logger = logging.getLogger(__name__)

SHARE_FOR_WEIGHTS = 0.8
"""A model stays in memory as long as its weights take at most this share of what is free."""

_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Free memory where blocks are worked on, None where that cannot be found out."""
    if not on_host(device):
        return free_memory(device)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None  # no Linux: nobody is surprised by a process that is ended
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit = _limit_of_group()
    return free if limit is None else min(free, limit)


def total_bytes(device: torch.device) -> int | None:
    """All memory of the place where blocks are worked on, None where that cannot be found out."""
    if not on_host(device):
        return whole_memory(device)
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return total if limit == "max" else min(total, int(limit))


def _limit_of_group() -> int | None:
    """What the control group of this process leaves, None where there is no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        stat = (_CGROUP / "memory.stat").read_text(encoding="ascii").split()
    except OSError:
        return None
    if limit == "max":
        return None
    # Files that were read count as used, but make room when it is needed.
    return int(limit) - used + int(stat[stat.index("inactive_file") + 1])


def goes_out_of_core(
    model: str | Path | nn.Module, options: RunOptions, *, check: Callable[[], None], kept: bool
) -> bool:
    """Whether to leave a model's blocks in their files; collective, and the same on all processes.

    Args:
        model: what the user gave.
        options: with the user's word; None leaves it to the memory that is free. In memory, each
            process of the team has the whole model.
        check: raises if what is asked for cannot be done out of core.
        kept: whether there are an output and a work folder, without which there is no place for
            finished blocks.

    Raises:
        InputError: the user wants what cannot be done; says why.
    """
    wanted, team = options.out_of_core, options.team
    if options.dequantize:
        refuse_unused("restored weights are in memory, not out of core", {"out_of_core": wanted})
        return False
    if wanted is False or (wanted is None and (isinstance(model, nn.Module) or not kept)):
        return False
    if isinstance(model, nn.Module):
        raise InputError("a model object is in memory already; out of core takes a folder or name")
    if wanted:
        if not kept:
            raise InputError(
                "out of core, finished blocks are kept in a work folder and assembled in the "
                "output; give an output, and do not switch resuming off"
            )
        check()
        return True
    needed, free = _weights_needed(str(model), options)
    if on_host(resolve_device(options.device)) and needed is not None:
        needed *= team.size  # each holds the model; those of other machines are counted as well
    short = needed is not None and free is not None and needed > SHARE_FOR_WEIGHTS * free
    if not any(team.gather(short)):  # a process may have less memory than the others
        return False
    check()
    if short:
        logger.info("weights need %d bytes, %d are free: working out of core", needed, free)
    return True


def _weights_needed(model: str, options: RunOptions) -> tuple[int | None, int | None]:
    """Bytes of the weights in the working dtype, and bytes that are free."""
    folder = Path(model)
    if not any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
        return None, None
    config: Any = read_config(model, options.trust_remote_code)
    place = resolve_device(options.device)
    stored = stored_dtype(config)
    working = resolve_dtype(options.dtype, stored, place)
    needed = Shards(folder).bytes * working.itemsize // stored.itemsize
    return needed, available_bytes(place)
