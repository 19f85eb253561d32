"""Memory that runs out, told as such wherever it happens, with what helps."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from spectrim.errors import MemoryShortError, SpectrimError

P = ParamSpec("P")
R = TypeVar("R")

_WORDS = (
    "allocate memory",
    "out of memory",
    "bad_alloc",
    "unable to allocate",
    "failed to map segment",
    "can't start new thread",
    "pthread_create failed",
    "not enough memory",
    "unable to mmap",
)
"""Of the messages of torch, NumPy, the loader of libraries and the system."""


def ran_short(error: BaseException | None) -> MemoryShortError | None:
    """What to say where an error, or what caused it, is a lack of memory; None where it is not."""
    while error is not None:
        if isinstance(error, MemoryShortError):
            return error
        words = str(error).lower()
        kinds = (RuntimeError, OSError, ImportError, SpectrimError)
        if isinstance(error, MemoryError) or (
            isinstance(error, kinds) and any(word in words for word in _WORDS)
        ):
            first = (str(error).strip().splitlines() or ["no more to be had"])[0]
            return MemoryShortError(
                f"memory ran out ({first[:200]}): `spectrim compress --out-of-core` "
                "(out_of_core=True) reads blocks one at a time, and fewer or shorter windows "
                "(--windows, --window-length) and --offload-streams need less as well"
            )
        error = error.__cause__ or error.__context__
    return None


def tells_of_shortage(function: Callable[P, R]) -> Callable[P, R]:
    """A function of the interface whose lack of memory is a `MemoryShortError`."""

    @wraps(function)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (MemoryError, RuntimeError, OSError, ImportError, SpectrimError) as error:
            short = ran_short(error)
            if short is None or short is error:
                raise
            raise short from error

    return told
