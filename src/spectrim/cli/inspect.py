"""`spectrim inspect`: what a compressed folder holds, without loading a single weight."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options

__all__ = ["inspect"]


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed folder.")],
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Print ranks, shapes and bytes of OUT without loading it."""
    from spectrim.cli.session import session

    with session(verbose=verbose, quiet=True):
        from spectrim import api

        found = api.inspect(folder)
    from spectrim.cli.render import print_json
    from spectrim.cli.results import print_inspection

    if as_json:
        print_json(found)
    else:
        print_inspection(found)
