"""`spectrim export`: ordinary dense weights for tools that do not know spectrim."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options
from spectrim.errors import InputError

__all__ = ["export"]


def export(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed folder.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write to.")
    ],
    dense: Annotated[
        bool, typer.Option("--dense", help="Multiply the factors out (the one format so far).")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR if it exists and is not empty.")
    ] = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Write OUT's model with ordinary dense weights to DIR."""
    from spectrim.cli.session import session

    if not dense:
        raise InputError("export writes dense weights: say --dense to confirm the larger folder")
    with session(verbose=verbose, quiet=quiet, output=output):
        from spectrim import api

        api.export(folder, output=output, **options.given(overwrite=overwrite or None))
    from spectrim.cli.render import print_facts

    print_facts({"output": output})
