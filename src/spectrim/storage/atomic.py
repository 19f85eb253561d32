"""Folders that are either finished or not there.

A result is written into a hidden sibling of its destination, flushed to disk, and renamed. A crash,
an interrupt or a full disk never leaves a folder that looks finished, and never costs the user the
folder that was there before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from spectrim.errors import OutputError

__all__ = ["RESULT_MARKS", "check_output", "new_folder"]

RESULT_MARKS = ("config.json", "spectrim_report.json", "survey.json")
"""A folder is replaced only if it holds one of these: `--overwrite` must not empty a home."""


def check_output(output: str | Path, *, overwrite: bool) -> Path:
    """The resolved destination, if something may be written there.

    Call it before hours of work as well; `new_folder` calls it again.

    Raises:
        OutputError: it is a file, or a folder that is not empty and may not be replaced.
    """
    try:
        return _checked(Path(output).resolve(), output, overwrite=overwrite)
    except PermissionError as error:
        raise OutputError(f"{output} cannot be written: {error}") from error


def _checked(path: Path, output: str | Path, *, overwrite: bool) -> Path:
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir())
        if found and not overwrite:
            raise OutputError(
                f"{output} exists and holds {len(found)} entries ({found[0]!r}, ...); "
                "choose another folder or pass --overwrite (overwrite=True)"
            )
        if found and not any(mark in found for mark in RESULT_MARKS):
            raise OutputError(
                f"{output} holds {len(found)} entries ({found[0]!r}, ...) but none of "
                f"{', '.join(RESULT_MARKS)}: it is no model folder and is not replaced"
            )
    elif path.exists():
        raise OutputError(f"{output} exists and is not a folder")
    above = next(p for p in path.parents if p.exists())
    if not os.access(above, os.W_OK | os.X_OK) or not above.is_dir():
        raise OutputError(f"{output} cannot be written: {above} is not a folder open to writing")
    return path


@contextmanager
def new_folder(output: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Write into the folder that is yielded; it becomes `output` when the block ends well.

    Raises:
        OutputError: see `check_output`, or something could not be written; nothing is left behind
            and whatever was at `output` is still there.
    """
    path = check_output(output, overwrite=overwrite)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
        _flush(partial)
        _move(partial, path)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"{output} could not be written: {error}; nothing was left there") from (
            error
        )
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Force everything to disk: a rename may otherwise outlive the data after a power cut."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _move(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    retired = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    path.rename(retired)
    try:
        partial.rename(path)
    except OSError:
        retired.rename(path)
        raise
    shutil.rmtree(retired)
