"""`spectrim export`: what tools that do not know spectrim read."""

from __future__ import annotations

from typing import Annotated

import typer

from spectrim.cli import options
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes
from spectrim.errors import InputError
from spectrim.sizes import format_bytes


@takes()
def export(
    terminal: Terminal,
    folder: options.Compressed,
    output: options.OutputFolder,
    dense: Annotated[
        bool, typer.Option("--dense", help="Multiply the factors out: ordinary weights.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="compressed-tensors, gguf (codes as they are) or onnx (two products a layer).",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DIR if it exists and is not empty.")
    ] = False,
) -> None:
    """Write OUT's model to DIR, as ordinary dense weights or in a format of inference engines."""
    if dense == (to is not None):
        raise InputError(
            "say either --dense, to confirm the larger folder, or --format with "
            "compressed-tensors, gguf or onnx"
        )
    with terminal.working(output=output):
        from spectrim import api

        given = options.given(to=to, overwrite=overwrite or None)
        api.export(folder, output=output, **given)
    from spectrim.cli.render import print_facts
    from spectrim.storage.inspect import inspect_folder

    if to in ("gguf", "onnx"):
        graph = (file for file in output.iterdir() if file.suffix in (".gguf", ".onnx", ".data"))
        written = sum(file.stat().st_size for file in graph)
    else:
        written = inspect_folder(output).bytes
    facts = {"bytes": format_bytes(written), "output": output}
    terminal.show({"output": str(output), "bytes": written}, lambda _: print_facts(facts))
