"""`spectrim distortion` and `spectrim layer-errors`: where along the depth results depart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options, study
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import CALIBRATING, MEASURING, takes

Folder = Annotated[
    Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for table and pictures.")
]


@takes("recipes", "objectives", "keep", *CALIBRATING, *MEASURING, told=("verbose", "quiet"))
def distortion(
    terminal: Terminal,
    model: options.Model,
    output: Folder,
    results: study.Results = None,
    **words: Any,
) -> None:
    """Compare the output of every block and projection with the dense MODEL's.

    Give folders of compressed models, or --recipes to run on MODEL at --keep. DIR receives
    distortion.csv and .json, and the squared error and cosine distance of the blocks as pictures,
    one line per result. Finished runs of recipes are kept there and reused.
    """
    found = _follow("distortion", terminal, model, output, results, words)
    from spectrim.cli.study_tables import print_depth

    print_depth(found, output)


@takes("recipes", "objectives", "keep", *CALIBRATING, *MEASURING, told=("verbose", "quiet"))
def layer_errors(
    terminal: Terminal,
    model: options.Model,
    output: Folder,
    results: study.Results = None,
    **words: Any,
) -> None:
    """Draw the predicted and the measured error of every layer.

    Give --objectives or --recipes to run on MODEL at --keep, or folders of compressed models;
    without any, the objectives plain, whitened, shifted and anchored are compared. Measured is on
    held-out text, original network against compressed one. DIR receives layer_errors.csv, .json,
    .png and .svg; finished runs are kept there and reused.
    """
    found = _follow("layer_errors", terminal, model, output, results, words)
    from spectrim.cli.study_tables import print_layer_errors

    print_layer_errors(found, output)


def _follow(
    name: str,
    terminal: Terminal,
    model: str,
    output: Path,
    results: list[Path] | None,
    words: Mapping[str, Any],
) -> Any:
    """Carry out the study of that name."""
    with terminal.working(output=output, resumes=True) as progress:
        from spectrim import studies

        chosen = {
            "recipes": study.names(words["recipes"]),
            "objectives": study.names(words["objectives"]),
            "measure": study.measure(words, progress),
            "output": output,
            **study.calibration(words),
        }
        if name == "layer_errors" and not (chosen["objectives"] or chosen["recipes"] or results):
            chosen["objectives"] = list(studies.PUBLISHED_OBJECTIVES)
        return getattr(studies, name)(model, results or (), **chosen)
