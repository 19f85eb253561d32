"""Options that several commands share, so that a word means the same everywhere.

Options that are None are not passed on: every default lives in the recipe or in `spectrim.api`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.arguments import check_fraction


def check_keep(keep: float | None) -> float | None:
    """Refuse an impossible keep at once, before anything heavy is imported.

    Raises:
        BudgetError: not in (0, 1].
    """
    check_fraction(keep=keep)
    return keep


def check_size(size: str | None) -> str | None:
    """Refuse what is no size at once.

    Raises:
        BudgetError: no positive number of bytes with a unit.
    """
    if size is not None:
        from spectrim.sizes import parse_size

        parse_size(size)
    return size


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model name on the Hugging Face hub, or a folder.")
]
Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write the result to.")
]
OutputFolder = Annotated[
    Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write to.")
]
Compressed = Annotated[Path, typer.Argument(metavar="OUT", help="A compressed folder.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it exists and is not empty.")
]
Every = Annotated[bool, typer.Option("--all", help="Every target instead of a summary.")]


def given(**options: Any) -> dict[str, Any]:
    """The options the user gave; the others keep the library's defaults.

    A repeatable option that was not given may come as an empty list.
    """
    return {name: value for name, value in options.items() if value is not None and value != []}
