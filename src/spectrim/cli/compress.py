"""`spectrim compress`: make a model smaller and save it as a Hugging Face folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import CALIBRATING, takes

CARRYING = (
    *("survey", "on_failure", "work", "resume", "self_contained", "overwrite"),
    *("measure", "evaluation_text"),
)
"""Words without effect on what is predicted."""


@takes(
    *("keep", "size", "max_loss", "energy", "recipe", "effort", "plan", "survey"),
    *("only", "skip", "multiple", "storage", "weights", "alike", *CALIBRATING, "batch", "bos"),
    *("measure", "evaluation_text"),
    *("device", "dtype", "out_of_core", "offload_streams", "on_failure", "trust_remote_code"),
    "dequantize",
    *("work", "resume", "self_contained", "overwrite"),
)
def compress(
    terminal: Terminal,
    model: options.Model,
    output: options.Output,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Predict time and peak memory; load and write nothing."),
    ] = False,
    **words: Any,
) -> None:
    """Compress MODEL and save the result to OUT.

    OUT is an ordinary Hugging Face folder with a model card, the complete recipe and a report.
    With the recipe acip it is an elastic artifact, which `spectrim resize` cuts to any size.
    """
    from spectrim.cli.crew import answer_at_once, crew

    answer_at_once(words)
    place = {} if dry_run else {"output": output, "work": words["work"]}
    with (
        terminal.working(**place, resumes=words["resume"] is not False) as progress,
        crew(words["device"], progress) as team,
    ):
        from spectrim import api

        if dry_run:
            from spectrim.cli.results import print_estimate

            if team.leads:
                predicted = {name: words[name] for name in words if name not in CARRYING}
                found = api.estimate(model, **options.given(**predicted))
                terminal.show(found.summary(), print_estimate)
            return
        result = api.compress(
            model, output=output, progress=progress, team=team, **options.given(**words)
        )
    if not team.leads:
        return
    from spectrim.cli.results import print_compression

    terminal.show({"output": str(output), **result.report}, print_compression)
