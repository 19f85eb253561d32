"""`spectrim calibration-study`: how much calibration text a recipe needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options, study
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import MEASURING, takes


@takes("recipes", "keep", "text", "window_length", *MEASURING)
def calibration_study(
    terminal: Terminal,
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="DIR", help="Folder; finished points are reused."),
    ],
    windows: Annotated[
        str | None,
        typer.Option(
            "--windows", metavar="N,...", help="Calibration windows; default 8,16,32,64,128,256."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="N,...", help="Several draws; default 0.")
    ] = None,
    **words: Any,
) -> None:
    """Measure how quality grows with the number of calibration windows.

    DIR receives calibration.json, .csv, .png and .svg. A run that was cut off goes on where it
    was, and further recipes, numbers or seeds add only themselves.
    """
    chosen = {
        "recipes": study.names(words["recipes"]) or None,
        "windows": study.numbers("--windows", windows, least=1),
        "seeds": study.numbers("--seeds", seeds, least=0),
    }
    with terminal.working(output=output, resumes=True) as progress:
        from spectrim import studies

        found = studies.calibration_study(
            model,
            measure=study.measure(words, progress),
            output=output,
            **options.given(**chosen),
            **study.calibration(words),
        )
    from spectrim.cli.study_tables import print_calibration

    terminal.show(found.record(), print_calibration, output)
