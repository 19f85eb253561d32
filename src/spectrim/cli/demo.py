"""`spectrim demo`: the whole job on the bundled model, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes


@takes(told=("verbose", "quiet"))
def demo(
    terminal: Terminal,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write the result to.")
    ] = Path("demo-output"),
    keep: Annotated[
        float,
        typer.Option(
            "--keep",
            metavar="FRACTION",
            callback=options.check_keep,
            help="Fraction of the targets' bytes to keep.",
        ),
    ] = 0.6,
    overwrite: options.Overwrite = False,
) -> None:
    """Compress the bundled Llama and show what it costs."""
    with terminal.working(output=output) as progress:
        from spectrim.demo.run import run_demo

        found = run_demo(output, keep=keep, overwrite=overwrite, progress=progress)
    from spectrim.cli.results import print_demo

    print_demo(found)
