"""`spectrim compare`: recipes side by side at equal sizes, each run in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options, study

__all__ = ["compare"]


def compare(
    model: options.Model,
    recipes: study.Recipes = None,
    keep: Annotated[
        str, typer.Option("--keep", metavar="SIZES", help="0.8,0.6,0.4 or 0.9..0.3.")
    ] = "0.8,0.6,0.4",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="OUT", help="Folder for compare.md, .csv and .json."
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
    """Run every recipe at every size and print one table with uncertainty, time and memory.

    A row that cannot be told from the best of its size by a paired bootstrap says so.
    """
    from spectrim.cli.session import session

    with session(verbose=verbose, quiet=quiet or as_json, output=output, resumes=True) as progress:
        from spectrim import studies

        found = studies.compare(
            model,
            recipes=study.names(recipes),
            keep=keep,
            measure=study.measure(
                evaluation_text, evaluation_length, max_tokens, device, dtype, trust_remote_code
            ),
            output=output,
            progress=progress,
            **options.given(text=text, windows=windows, window_length=window_length, seed=seed),
        )
    from spectrim.cli.render import print_json
    from spectrim.cli.study import print_comparison

    if as_json:
        print_json(found.record())
    else:
        print_comparison(found.record(), output)
