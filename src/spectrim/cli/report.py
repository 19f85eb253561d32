"""`spectrim report`: one self-contained HTML page about a result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes


@takes(
    *("window_length", "max_tokens", "device", "dtype", "trust_remote_code"),
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
    against: options.Against = None,
    others: Annotated[
        list[Path] | None,
        typer.Option("--with", metavar="OUT", help="Another result to follow along depth."),
    ] = None,
    curve: Annotated[
        Path | None,
        typer.Option("--curve", metavar="DIR", help="What `spectrim curve` wrote."),
    ] = None,
    survey: Annotated[
        Path | None,
        typer.Option("--survey", metavar="DIR", help="What `spectrim survey` wrote: spectra."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option("--text", metavar="SOURCE", help="Text to measure on, with --against."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="Continued by both models."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace FILE if it exists.")
    ] = False,
    **words: Any,
) -> None:
    """Write a page with figures, tables, protocol and recipe of OUT.

    With --against, the dense model is measured beside it, both are followed along depth, and both
    continue a prompt. The page needs no network and no other file.
    """
    words |= {"against": against, "others": others, "curve": curve, "survey": survey}
    words |= {"text": text, "prompts": prompt}
    with terminal.working(output=output):
        from spectrim import studies
        from spectrim.run.options import RunOptions

        placed = {name: words.pop(name) for name in ("device", "dtype", "trust_remote_code")}
        ways = RunOptions(**options.given(**placed))
        given = {"overwrite": overwrite, "options": ways, **options.given(**words)}
        studies.report(folder, output=output, **given)
    from spectrim.cli.render import print_facts

    print_facts({"output": output})
