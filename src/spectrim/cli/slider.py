"""`spectrim slider`: a local page that shows what every size of an elastic artifact writes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import study
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import MEASURING, takes


@takes(*MEASURING, told=("verbose",))
def slider(
    terminal: Terminal,
    artifact: Annotated[
        Path,
        typer.Argument(
            metavar="ELASTIC", help="An elastic artifact, or what `spectrim survey` wrote."
        ),
    ],
    curve: Annotated[
        Path | None,
        typer.Option(
            "--curve", metavar="DIR", help="What `spectrim curve ELASTIC` wrote; spares measuring."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; others than this one are exposed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes any free one.")] = 7860,
    **words: Any,
) -> None:
    """Serve a page with one slider for the size.

    Dense and compressed model continue your prompt side by side. With --evaluation-text the page
    measures perplexity too. Ctrl-C ends it.
    """
    with terminal.working() as progress:
        from spectrim import studies
        from spectrim.cli.render import print_facts, print_note

        server = studies.slider(
            artifact,
            measure=study.measure(words, progress),
            curve=curve,
            host=host,
            port=port,
        )
        print_facts({"page": server.url, "end": "Ctrl-C"})
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            # The way to end it that its own line names, not an interruption of work.
            print_note("stopped")
        finally:
            server.server_close()
