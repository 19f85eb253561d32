"""`spectrim export`: what tools that do not know spectrim read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectrim.cli import options
from spectrim.errors import InputError

__all__ = ["export"]


def export(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed folder.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write to.")
    ],
    dense: Annotated[
        bool, typer.Option("--dense", help="Multiply the factors out: ordinary weights.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="compressed-tensors, gguf (integers as they are) or onnx (two products a layer).",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR if it exists and is not empty.")
    ] = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Write OUT's model to DIR, as ordinary dense weights or in a format of inference engines."""
    from spectrim.cli.session import session

    if dense == (to is not None):
        raise InputError(
            "say either --dense, to confirm the larger folder, or --format with "
            "compressed-tensors, gguf or onnx"
        )
    with session(verbose=verbose, quiet=quiet or as_json, output=output):
        from spectrim import api

        given = options.given(to=to, overwrite=overwrite or None)
        api.export(folder, output=output, **given)
    from spectrim.cli.render import format_bytes, print_facts, print_json
    from spectrim.storage.inspect import inspect_folder

    if to in ("gguf", "onnx"):
        graph = (file for file in output.iterdir() if file.suffix in (".gguf", ".onnx", ".data"))
        written = sum(file.stat().st_size for file in graph)
    else:
        written = inspect_folder(output).bytes
    if as_json:
        print_json({"output": str(output), "bytes": written})
    else:
        print_facts({"bytes": format_bytes(written), "output": output})
