"""Options that several commands share, so that a word means the same everywhere.

Options that are None are not passed on: every default lives in the recipe or in `spectrim.api`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Against",
    "AsJson",
    "Model",
    "Output",
    "Overwrite",
    "Quiet",
    "Verbose",
    "given",
]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model name on the Hugging Face hub, or a folder.")
]
Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write the result to.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it exists and is not empty.")
]
Against = Annotated[
    str | None,
    typer.Option("--against", metavar="MODEL", help="The dense model to compare with."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Log every step to stderr.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, only warnings.")]


def given(**options: Any) -> dict[str, Any]:
    """The options the user gave; the others keep the library's defaults."""
    return {name: value for name, value in options.items() if value is not None}
