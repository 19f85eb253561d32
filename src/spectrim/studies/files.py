"""Where a study writes: folders that are taken up again, files that are whole or not there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spectrim.errors import OutputError
from spectrim.report.drawing import save_figure
from spectrim.storage.ownership import Source, check_apart
from spectrim.storage.whole_file import check_file, whole_file
from spectrim.studies.reference import PointStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS_FOLDER = "points"
"""Finished points inside a study's folder; also what tells such a folder from others."""


def open_study(
    output: str | Path | None, *, writes: Sequence[str], sources: Iterable[Source]
) -> tuple[Path | None, PointStore]:
    """The folder of a study with its finished points; one that exists is taken up again.

    Args:
        output: the folder, None for a study that is only returned.
        writes: files that the study will write there.
        sources: what it reads, which lies elsewhere.

    Raises:
        OutputError: it is no folder, cannot be written, lies where a source is, or a file that
            the study would write was not written by one.
    """
    if output is None:
        return None, PointStore(None)
    folder = Path(output)
    check_apart(folder, sources)
    try:
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{folder} exists and is not a folder")
        taken = [name for name in writes if (folder / name).exists()]
        if taken and not (folder / POINTS_FOLDER).is_dir():
            raise OutputError(
                f"{folder} holds {taken[0]!r}, which no study of spectrim wrote; choose another "
                "folder"
            )
        (folder / POINTS_FOLDER).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror or error}") from error
    for name in writes:
        check_file(folder / name, overwrite=True, option="OUT")
    return folder, PointStore(folder / POINTS_FOLDER)


def save_pictures(figure: Figure, path: Path) -> None:
    """Write a figure as `path.png` and `path.svg`, both whole or not at all."""
    for kind in ("png", "svg"):
        whole = path.with_name(f"{path.name}.{kind}")
        try:
            with whole_file(whole) as partial:
                save_figure(figure, partial, kind=kind)
        except OSError as error:
            raise OutputError(f"{whole} cannot be written: {error.strerror or error}") from error
