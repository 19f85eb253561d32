"""Files that are whole or not there: written under another name, forced to disk, renamed.

A kill, a full disk or a power cut at any moment leaves the file that was there before, or the new
one. Nothing half-written ever has the name that others look for. No torch.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spectrim.errors import OutputError

PARTIAL = ".partial"
"""Ends the name of a file that is being written."""

CHUNK = 2**22


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The name to write under; it becomes `path` when the block ends well.

    Named after the process, since two processes may write into one folder.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        # Whatever keeps it from being written may keep it from being removed.
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        with whole_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error


def check_file(path: str | Path, *, overwrite: bool, option: str) -> Path:
    """The place of a file to be written, if it may be; call it before the work.

    Args:
        path: the file.
        overwrite: whether one that exists may be replaced.
        option: what the user calls it, for messages.

    Raises:
        OutputError: it exists, or its folder cannot be written to.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise OutputError(f"{path} is a folder; {option} is a file to write")
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists; choose another {option} or say --overwrite")
        if not path.parent.is_dir():
            raise OutputError(f"{path} cannot be written: there is no folder {path.parent}")
        # Asking for permission says nothing of a disk that is mounted for reading only.
        probe = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to disk, so that a rename survives a power cut."""
    if os.name == "nt":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
