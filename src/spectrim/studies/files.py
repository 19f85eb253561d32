"""Where a study writes: folders that are taken up again, files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from spectrim.errors import OutputError
from spectrim.report.drawing import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["save_pictures", "study_folder", "write_whole"]


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


def save_pictures(figure: Figure, path: Path) -> None:
    """Write a figure as `path.png` and `path.svg`, both whole or not at all."""
    for suffix in (".png", ".svg"):
        whole = path.with_name(path.name + suffix)
        # The suffix comes last: it tells matplotlib the format.
        partial = path.with_name(f".{path.name}.{os.getpid()}{suffix}")
        try:
            save_figure(figure, partial)
            partial.replace(whole)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OutputError(f"cannot write {whole}: {error.strerror}") from error
