"""`spectrim layer-errors`: what was predicted for every layer and what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options, study

__all__ = ["layer_errors"]


def layer_errors(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for table and picture.")
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
    """Draw the predicted and the measured error of every layer.

    Give --objectives or --recipes to run on MODEL at --keep, or folders of compressed models;
    without any, the objectives plain, whitened, shifted and anchored are compared. Measured is on
    held-out text, original network against compressed one. DIR receives layer_errors.csv, .json,
    .png and .svg; finished runs are kept there and reused.
    """
    from spectrim.cli.session import session

    with session(verbose=verbose, quiet=quiet, output=output, resumes=True) as progress:
        from spectrim import studies

        chosen = study.names(objectives)
        if not (chosen or recipes or results):
            chosen = list(studies.PUBLISHED_OBJECTIVES)
        found = studies.layer_errors(
            model,
            results or (),
            recipes=study.names(recipes),
            objectives=chosen,
            measure=study.measure(
                evaluation_text, evaluation_length, max_tokens, device, dtype, trust_remote_code
            ),
            output=output,
            progress=progress,
            **options.given(
                keep=keep, text=text, windows=windows, window_length=window_length, seed=seed
            ),
        )
    from spectrim.cli.study_tables import print_layer_errors

    print_layer_errors(found, output)
