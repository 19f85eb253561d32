"""`spectrim calibration-study`: how much calibration text a recipe needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options, study

__all__ = ["calibration_study"]


def calibration_study(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="DIR", help="Folder; finished points are reused."),
    ],
    recipes: study.Recipes = None,
    windows: Annotated[
        str | None,
        typer.Option(
            "--windows", metavar="N,...", help="Calibration windows; default 8,16,32,64,128,256."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", metavar="N,...", help="Several draws; default 0.")
    ] = None,
    keep: options.Keep = None,
    text: options.Text = None,
    window_length: options.WindowLength = None,
    evaluation_text: study.EvaluationText = None,
    evaluation_length: study.EvaluationLength = None,
    max_tokens: study.MaxTokens = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure how quality grows with the number of calibration windows.

    DIR receives calibration.json, .csv, .png and .svg. A run that was cut off goes on where it
    was, and further recipes, numbers or seeds add only themselves.
    """
    from spectrim.cli.session import session

    chosen = {
        "recipes": study.names(recipes) or None,
        "windows": study.numbers("--windows", windows, least=1),
        "seeds": study.numbers("--seeds", seeds, least=0),
    }
    with session(verbose=verbose, quiet=quiet or as_json, output=output, resumes=True) as progress:
        from spectrim import studies

        found = studies.calibration_study(
            model,
            measure=study.measure(
                evaluation_text, evaluation_length, max_tokens, device, dtype, trust_remote_code
            ),
            output=output,
            progress=progress,
            **options.given(**chosen, keep=keep, text=text, window_length=window_length),
        )
    from spectrim.cli.render import print_json
    from spectrim.cli.study_tables import print_calibration

    if as_json:
        print_json(found.record())
    else:
        print_calibration(found.record(), output)
