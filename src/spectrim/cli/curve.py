"""`spectrim curve`: distortion against rate for several recipes, or for an elastic artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import study
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import CALIBRATING, MEASURING, takes


@takes("recipes", *CALIBRATING, *MEASURING)
def curve(
    terminal: Terminal,
    model: Annotated[
        str, typer.Argument(metavar="MODEL|ELASTIC", help="A model, or an elastic artifact.")
    ],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="OUT", help="Folder; finished points are reused."),
    ],
    keep: Annotated[
        str,
        typer.Option("--keep", metavar="SIZES", help="0.9..0.3, 0.9..0.3:0.05, or 0.8,0.6,0.4."),
    ] = "0.9..0.3",
    dense_quantized: Annotated[
        str | None,
        typer.Option(
            "--dense-quantized",
            "--dense-quantised",
            metavar="A,B",
            help="Reference points: the uncut model in int8, int4, or both as int8,int4.",
        ),
    ] = None,
    **words: Any,
) -> None:
    """Measure what every size costs: nats per token above dense against bits per weight.

    OUT receives curve.json, curve.csv, curve.png and curve.svg. A run that was cut off goes on
    where it was, and further sizes or recipes add only themselves.
    """
    with terminal.working(output=output, resumes=True) as progress:
        from spectrim import studies

        found = studies.curve(
            model,
            recipes=study.names(words["recipes"]),
            keep=keep,
            formats=study.names(dense_quantized),
            measure=study.measure(words, progress),
            output=output,
            **study.calibration(words),
        )
    terminal.show(found.record(), study.print_curve, output)
