"""`spectrim layer-errors`: what was predicted for every layer and what came out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options, study
from spectrim.cli.words import CALIBRATING, MEASURING, takes

__all__ = ["layer_errors"]


@takes("recipes", "objectives", "keep", *CALIBRATING, *MEASURING)
def layer_errors(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for table and picture.")
    ],
    results: study.Results = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    **words: Any,
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

        chosen = study.along_depth(words, output, progress)
        if not (chosen["objectives"] or chosen["recipes"] or results):
            chosen["objectives"] = list(studies.PUBLISHED_OBJECTIVES)
        found = studies.layer_errors(model, results or (), **chosen)
    from spectrim.cli.study_tables import print_layer_errors

    print_layer_errors(found, output)
