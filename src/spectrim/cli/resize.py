"""`spectrim resize`: another size from an elastic artifact, in seconds and without data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.words import takes

__all__ = ["resize"]


@takes("keep", "size", "dequantize", "overwrite")
def resize(
    artifact: Annotated[
        Path, typer.Argument(metavar="ELASTIC", help="An elastic artifact, e.g. of recipe acip.")
    ],
    output: options.Output,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    **words: Any,
) -> None:
    """Write ELASTIC's model at another size to OUT."""
    from spectrim.cli.session import session

    with session(verbose=verbose, quiet=quiet or as_json, output=output):
        from spectrim import api

        result = api.resize(artifact, output=output, **options.given(**words))
    from spectrim.cli.render import print_json
    from spectrim.cli.results import print_compression

    if as_json:
        print_json({"output": str(output), **result.report})
    else:
        print_compression(result.report, output)
