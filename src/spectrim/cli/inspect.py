"""`spectrim inspect`: what a compressed folder holds, without loading a single weight."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options

__all__ = ["inspect"]


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed folder.")],
    every: options.Every = False,
    as_json: options.AsJson = False,
) -> None:
    """Print ranks, shapes and bytes of OUT without loading it."""
    from spectrim.cli.render import print_json
    from spectrim.cli.results import print_inspection

    # Not through `spectrim.api`: that imports torch, and headers are read in a moment without it.
    from spectrim.storage.inspect import inspect_folder

    found = inspect_folder(folder)
    record = {
        "folder": str(folder),
        **found.summary(),
        "targets": [{**asdict(target), "kept": target.kept} for target in found.targets],
    }
    if as_json:
        print_json(record)
    else:
        print_inspection(record, every=every)
