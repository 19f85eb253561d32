"""The HTML page of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectrim.errors import OutputError
from spectrim.measure.page import gather_page
from spectrim.report.page import render_page
from spectrim.studies.files import write_whole

__all__ = ["report"]


def report(
    folder: str | Path, *, output: str | Path, overwrite: bool = False, **options: Any
) -> Path:
    """Write the HTML page of a result; `options` as in `run.page.gather_page`.

    Raises:
        SpectrimError: the page exists, or something asked for cannot be read or measured.
    """
    path = Path(output)
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"{path} exists; choose another file or pass --overwrite")
    write_whole(path, render_page(gather_page(folder, **options)))
    return path
