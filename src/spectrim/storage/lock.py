"""One writer per place: a lock that dies with its process.

The lock is the kernel's, taken through `filelock`, on a small file that also names its holder. A
process that is killed leaves the file but not the lock, so the next one takes over unasked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from spectrim.errors import OutputError


@contextmanager
def locked(path: Path, *, place: str | Path) -> Iterator[None]:
    """Hold the lock file `path` for the time of the context; it is removed at the end.

    Args:
        path: the lock file; its folder exists.
        place: what it protects, for the message.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise OutputError(
            f"{place} is being written by another process (pid {_holder(path)}); wait for it, end "
            "it, or choose another folder"
        ) from error
    except OSError as error:
        raise OutputError(
            f"{place} cannot be locked: {error.strerror or error} ({path})"
        ) from error
    try:
        # For messages only: a full disk keeps the name out, not the lock.
        with suppress(OSError):
            path.write_text(f"{os.getpid()}\n", encoding="ascii")
        yield
    finally:
        # While it is still held, so that whoever waits for this file finds out that it is gone;
        # Windows lets go of a file first.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        lock.release()
        if os.name == "nt":
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")[:32].strip() or "unknown"
    except OSError:
        return "unknown"
