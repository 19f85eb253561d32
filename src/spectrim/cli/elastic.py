"""`spectrim elastic`: a survey's components as an elastic artifact, every size by slicing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes
from spectrim.run.reading_words import ElasticWords


@takes(
    *("score", "base", "self_contained", "overwrite"), of=ElasticWords, told=("verbose", "quiet")
)
def elastic(
    terminal: Terminal,
    survey: Annotated[
        Path, typer.Argument(metavar="SURVEY", help="A folder made by `spectrim survey`.")
    ],
    output: options.Output,
    **words: Any,
) -> None:
    """Write SURVEY's components, most important first, as an elastic artifact.

    `spectrim resize OUT` and `spectrim slider OUT` give any size of it without data.
    """
    with terminal.working(output=output):
        from spectrim import api

        made = api.elastic(survey, output, **options.given(**words))
    from spectrim.cli.render import print_facts

    print_facts(
        {
            "model": made.base.name,
            "ordered by": made.source,
            "smallest keep": f"{made.order.smallest_keep:.4f}",
            "output": output,
            "next": f"spectrim resize {output} --keep 0.6 -o smaller",
        }
    )
