"""Folders that are either finished or not there.

A result is written into a hidden sibling of its destination, flushed to disk, and renamed. A crash,
an interrupt or a full disk never leaves a folder that looks finished, and never costs the user the
folder that was there before.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from spectrim.errors import OutputError
from spectrim.storage.ownership import Source, check_apart, check_ours, seal


def check_output(output: str | Path, *, overwrite: bool, sources: Iterable[Source] = ()) -> Path:
    """The resolved destination, if something may be written there.

    Call it before hours of work as well; `new_folder` calls it again.

    Args:
        output: the folder.
        overwrite: replace what is there, as long as spectrim wrote all of it.
        sources: what the command reads, which must lie elsewhere.

    Raises:
        OutputError: it is a file, a folder that is not empty and may not be replaced, or where a
            source lies.
    """
    try:
        path = Path(output).resolve()
        if path.exists() and not path.is_dir():
            raise OutputError(f"{output} exists and is not a folder")
        check_apart(output, sources)
        return _checked(path, output, overwrite=overwrite)
    except (OSError, ValueError) as error:  # a name that is too long, or no name at all
        raise OutputError(f"{output} cannot be written: {error}") from error


def _checked(path: Path, output: str | Path, *, overwrite: bool) -> Path:
    if path.is_dir():
        found = sorted(entry.name for entry in path.iterdir())
        if found and not overwrite:
            raise OutputError(
                f"{output} exists and holds {len(found)} entries ({found[0]!r}, ...); "
                "choose another folder or pass --overwrite (overwrite=True)"
            )
        if found:
            check_ours(path)
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
        seal(partial)
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
