"""Where a study writes: folders that are taken up again, files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from spectrim.errors import OutputError

__all__ = ["study_folder", "write_whole"]


def study_folder(output: str | Path) -> Path:
    """The folder of a study; one that exists is taken up again."""
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} exists and is not a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {folder}: {error.strerror}") from error
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
