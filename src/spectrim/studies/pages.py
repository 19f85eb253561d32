"""The HTML page of a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectrim.errors import OutputError
from spectrim.measure.page import gather_page
from spectrim.report.page import PAGE_MARK, render_page
from spectrim.run.sources import sources_of
from spectrim.storage.ownership import check_apart
from spectrim.storage.whole_file import check_file, write_text

__all__ = ["report"]


def report(
    folder: str | Path, *, output: str | Path, overwrite: bool = False, **options: Any
) -> Path:
    """Write the HTML page of a result; `options` as in `measure.page.gather_page`.

    Raises:
        SpectrimError: the page exists, or something asked for cannot be read or measured.
    """
    read = sources_of(
        result=[folder, *options.get("others", ())],
        model=options.get("against"),
        curve=options.get("curve"),
        survey=options.get("survey"),
        text=options.get("text"),
    )
    check_apart(output, read)
    path = check_file(output, overwrite=overwrite, option="FILE")
    if path.exists() and PAGE_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise OutputError(f"{path} is no page of spectrim and is not replaced; choose another FILE")
    write_text(path, render_page(gather_page(folder, **options)))
    return path
