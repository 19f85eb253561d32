"""What torchrun tells a process about its place, read from the environment without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from spectrim.errors import InputError

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Placement:
    """The place of this process: its rank among all, and its number on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0


def placement(environment: Mapping[str, str] | None = None) -> Placement:
    """The place that torchrun gave this process; a lone process without torchrun.

    Raises:
        InputError: the variables are incomplete or no numbers.
    """
    found = os.environ if environment is None else environment
    if "WORLD_SIZE" not in found or "RANK" not in found:
        return Placement()
    missing = [name for name in _NEEDED if name not in found]
    if missing and found["WORLD_SIZE"] != "1":
        raise InputError(
            f"WORLD_SIZE is {found['WORLD_SIZE']} but {missing[0]} is not set; start several "
            "processes with torchrun, which sets all of them"
        )
    try:
        rank, size = int(found["RANK"]), int(found["WORLD_SIZE"])
        local = int(found.get("LOCAL_RANK", "0"))
    except ValueError as error:
        raise InputError(f"RANK, WORLD_SIZE or LOCAL_RANK is no number: {error}") from error
    if not 0 <= rank < size:
        raise InputError(f"RANK is {rank}, outside 0..{size - 1} of WORLD_SIZE {size}")
    return Placement(rank, size, local)
