"""`spectrim survey`: moments, spectra and scores of every target, once, for any number of plans."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.words import CALIBRATING, takes

__all__ = ["survey"]


@takes(
    *("recipe", "only", "skip", *CALIBRATING, "batch", "bos", "device", "dtype", "out_of_core"),
    *("trust_remote_code", "dequantize", "overwrite"),
)
def survey(
    model: options.Model,
    output: options.Output,
    scores: Annotated[
        str | None,
        typer.Option(
            "--scores",
            metavar="NAMES",
            help="first_order, second_order, kfac, measured, table; default the first two.",
        ),
    ] = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    **words: Any,
) -> None:
    """Measure MODEL once, for any number of plans.

    OUT holds moments, spectra and scores of every target; `spectrim plan OUT` reads it.
    """
    from spectrim.cli.crew import crew
    from spectrim.cli.session import session

    with (
        session(verbose=verbose, quiet=quiet or as_json, output=output, resumes=True) as progress,
        crew(words["device"], progress) as team,
    ):
        from spectrim import api

        made = api.survey(
            model,
            output=output,
            progress=progress,
            team=team,
            **options.given(
                **words, scores=None if scores is None else [s.strip() for s in scores.split(",")]
            ),
        )
    if not team.leads:
        return
    from spectrim.cli.progress import format_seconds
    from spectrim.cli.render import print_facts, print_json

    record = {
        "model": made.model_name,
        "targets": len(made.curves),
        "scores": list(made.scores),
        "seconds": sum(made.facts["seconds"].values()),
        "notes": list(made.notes),
        "output": str(output),
    }
    if as_json:
        print_json(record)
        return
    print_facts(
        {
            **record,
            "scores": ", ".join(made.scores),
            "seconds": None,
            "time": format_seconds(record["seconds"]),
            "notes": "; ".join(made.notes) or None,
            "next": f"spectrim plan {output} --keep 0.6",
        }
    )
