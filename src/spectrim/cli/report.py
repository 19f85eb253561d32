"""`spectrim report`: one self-contained HTML page about a result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes
from spectrim.run.loading_words import LoadWords
from spectrim.run.reading_words import ReportWords
from spectrim.run.word import among

MEASURING = ("text", "window_length", "max_tokens")


@takes(
    *("against", "others", "curve", "survey", *MEASURING, "prompts"),
    *("device", "dtype", "trust_remote_code", "overwrite"),
    of=ReportWords,
    told=("verbose", "quiet"),
)
def report(
    terminal: Terminal,
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that `spectrim compress` wrote.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="HTML file to write.")
    ] = Path("report.html"),
    **words: Any,
) -> None:
    """Write a page with figures, tables, protocol and recipe of OUT.

    With --against, the dense model is measured beside it, both are followed along depth, and both
    continue a prompt. The page needs no network and no other file.
    """
    said = options.given(**words)
    with terminal.working(output=output):
        from spectrim import studies
        from spectrim.run.options import RunOptions

        protocol = {name: said.pop(name) for name in MEASURING if name in said}
        ways = {name: said.pop(name) for name in among(said, LoadWords)}
        measure = studies.Measure(**protocol, options=RunOptions(**ways))
        studies.report(folder, measure, output=output, **said)
    from spectrim.cli.render import print_facts

    print_facts({"output": output})
