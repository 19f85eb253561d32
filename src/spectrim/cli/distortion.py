"""`spectrim distortion`: where along the depth compressed models depart from the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options, study
from spectrim.cli.words import CALIBRATING, MEASURING, takes

__all__ = ["distortion"]


@takes("recipes", "objectives", "keep", *CALIBRATING, *MEASURING)
def distortion(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for table and pictures.")
    ],
    results: study.Results = None,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    **words: Any,
) -> None:
    """Compare the output of every block and projection with the dense MODEL's.

    Give folders of compressed models, or --recipes to run on MODEL at --keep. DIR receives
    distortion.csv and .json, and the squared error and cosine distance of the blocks as pictures,
    one line per result. Finished runs of recipes are kept there and reused.
    """
    from spectrim.cli.session import session

    with session(verbose=verbose, quiet=quiet, output=output, resumes=True) as progress:
        from spectrim import studies

        chosen = study.along_depth(words, output, progress)
        found = studies.distortion(model, results or (), **chosen)
    from spectrim.cli.study_tables import print_depth

    print_depth(found, output)
