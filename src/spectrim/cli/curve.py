"""`spectrim curve`: distortion against rate for several recipes, or for an elastic artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options, study

__all__ = ["curve"]


def curve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL|ELASTIC", help="A model, or an elastic artifact.")
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            metavar="OUT",
            help="Folder; finished points are reused.",
        ),
    ],
    recipes: study.Recipes = None,
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
    text: options.Text = None,
    windows: options.Windows = None,
    window_length: options.WindowLength = None,
    seed: options.Seed = None,
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
    """Measure what every size costs: nats per token above dense against bits per weight.

    OUT receives curve.json, curve.csv, curve.png and curve.svg. A run that was cut off goes on
    where it was, and further sizes or recipes add only themselves.
    """
    from spectrim.cli.session import session

    with session(verbose=verbose, quiet=quiet or as_json, output=output, resumes=True) as progress:
        from spectrim import studies

        found = studies.curve(
            model,
            recipes=study.names(recipes),
            keep=keep,
            formats=study.names(dense_quantized),
            measure=study.measure(
                evaluation_text, evaluation_length, max_tokens, device, dtype, trust_remote_code
            ),
            output=output,
            progress=progress,
            **options.given(text=text, windows=windows, window_length=window_length, seed=seed),
        )
    from spectrim.cli.render import print_json
    from spectrim.cli.study import print_curve

    if as_json:
        print_json(found.record())
    else:
        print_curve(found.record(), output)
