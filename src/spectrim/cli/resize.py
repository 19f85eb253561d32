"""`spectrim resize`: another size from an elastic artifact, in seconds and without data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes


@takes("keep", "size", "dequantize", "overwrite")
def resize(
    terminal: Terminal,
    artifact: Annotated[
        Path, typer.Argument(metavar="ELASTIC", help="An elastic artifact, e.g. of recipe acip.")
    ],
    output: options.Output,
    **words: Any,
) -> None:
    """Write ELASTIC's model at another size to OUT."""
    with terminal.working(output=output):
        from spectrim import api

        result = api.resize(artifact, output=output, **options.given(**words))
    from spectrim.cli.results import print_compression

    terminal.show({"output": str(output), **result.report}, print_compression)
