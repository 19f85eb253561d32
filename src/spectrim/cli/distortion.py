"""`spectrim distortion`: where along the depth compressed models depart from the original."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options, study

__all__ = ["distortion"]


def distortion(
    model: options.Model,
    results: Annotated[
        list[Path], typer.Argument(metavar="OUT...", help="Folders of compressed models.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder for table and pictures.")
    ],
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

    DIR receives distortion.csv and .json, and the squared error and cosine distance of the blocks
    as pictures, one line per OUT.
    """
    from spectrim.cli.session import session

    with session(verbose=verbose, quiet=quiet, output=output):
        from spectrim import studies

        found = studies.distortion(
            model,
            results,
            measure=study.measure(
                evaluation_text, evaluation_length, max_tokens, device, dtype, trust_remote_code
            ),
            output=output,
        )
    from spectrim.cli.render import print_facts, print_table

    print_table(
        ("model", "block", "squared error", "relative error", "cosine distance"),
        [
            (
                one.model,
                str(one.block),
                f"{one.mse:.4g}",
                f"{one.relative:.4g}",
                f"{one.cosine:.4g}",
            )
            for one in found
            if one.projection == "block"
        ],
    )
    print_facts({"output": output})
