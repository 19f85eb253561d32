"""One writer per place: a lock that dies with its process.

The lock is the kernel's (`flock`), on a small file that also names its holder. A process that is
killed leaves the file but not the lock, so the next one takes over without being told to.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spectrim.errors import OutputError

__all__ = ["locked"]


@contextmanager
def locked(path: Path, *, place: str | Path) -> Iterator[None]:
    """Hold the lock file `path` for the time of the context; it is removed at the end.

    Args:
        path: the lock file; its folder exists.
        place: what it protects, for the message.

    Raises:
        OutputError: another process holds it, or it cannot be made.
    """
    descriptor = _take(path, place)
    try:
        yield
    finally:
        # Removed while it is still held: whoever waits for this file finds out that it is gone.
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _take(path: Path, place: str | Path) -> int:
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise OutputError(f"{place} cannot be locked: {error.strerror} ({path})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise OutputError(
                f"{place} is being written by another process (pid {holder or 'unknown'}); wait "
                "for it, end it, or choose another folder"
            ) from error
        if _is_current(descriptor, path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            return descriptor
        os.close(descriptor)


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the file that was locked is still the one under its name."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(descriptor)
    return (own.st_dev, own.st_ino) == (found.st_dev, found.st_ino)
