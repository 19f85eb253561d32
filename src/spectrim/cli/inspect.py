"""`spectrim inspect`: what a compressed folder holds, without loading a single weight."""

from __future__ import annotations

from dataclasses import asdict

from spectrim.cli import options
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes


@takes(told=("as_json",))
def inspect(
    terminal: Terminal,
    folder: options.Compressed,
    every: options.Every = False,
) -> None:
    """Print ranks, shapes and bytes of OUT without loading it."""
    from spectrim.cli.results import print_inspection

    # Not through `spectrim.api`: that imports torch, and headers are read in a moment without it.
    from spectrim.storage.inspect import inspect_folder

    found = inspect_folder(folder)
    record = {
        "folder": str(folder),
        **found.summary(),
        "targets": [{**asdict(target), "kept": target.kept} for target in found.targets],
    }
    terminal.show(record, print_inspection, every)
