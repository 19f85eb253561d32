"""`spectrim distortion`: where along the depth compressed models depart from the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options, study

__all__ = ["distortion"]


def distortion(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for table and pictures.")
    ],
    results: study.Results = None,
    recipes: study.Recipes = None,
    objectives: study.Objectives = None,
    keep: options.Keep = None,
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
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare the output of every block and projection with the dense MODEL's.

    Give folders of compressed models, or --recipes to run on MODEL at --keep. DIR receives
    distortion.csv and .json, and the squared error and cosine distance of the blocks as pictures,
    one line per result. Finished runs of recipes are kept there and reused.
    """
    from spectrim.cli.session import session

    with session(verbose=verbose, quiet=quiet, output=output, resumes=True) as progress:
        from spectrim import studies

        found = studies.distortion(
            model,
            results or (),
            recipes=study.names(recipes),
            objectives=study.names(objectives),
            measure=study.measure(
                evaluation_text, evaluation_length, max_tokens, device, dtype, trust_remote_code
            ),
            output=output,
            progress=progress,
            **options.given(
                keep=keep, text=text, windows=windows, window_length=window_length, seed=seed
            ),
        )
    from spectrim.cli.study_tables import print_depth

    print_depth(found, output)
