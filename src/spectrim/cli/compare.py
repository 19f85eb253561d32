"""`spectrim compare`: recipes side by side at equal sizes, each run in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options, study
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import CALIBRATING, MEASURING, takes


@takes("recipes", *CALIBRATING, *MEASURING)
def compare(
    terminal: Terminal,
    model: options.Model,
    keep: Annotated[
        str, typer.Option("--keep", metavar="SIZES", help="0.8,0.6,0.4 or 0.9..0.3.")
    ] = "0.8,0.6,0.4",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="Folder for compare.md, .csv and .json."
        ),
    ] = None,
    **words: Any,
) -> None:
    """Run every recipe at every size and print one table with uncertainty, time and memory.

    A row that cannot be told from the best of its size by a paired bootstrap says so.
    """
    with terminal.working(output=output, resumes=True) as progress:
        from spectrim import studies

        found = studies.compare(
            model,
            recipes=study.names(words["recipes"]),
            keep=keep,
            measure=study.measure(words, progress),
            output=output,
            **study.calibration(words),
        )
    terminal.show(found.record(), study.print_comparison, output)
