"""`spectrim heal`: train what compression left, on a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes
from spectrim.run.reading_words import HealWords


@takes(
    *("parts", "teacher", "steps", "batch", "rank", "learning_rate", "windows", "window_length"),
    *("seed", "device", "dtype", "trust_remote_code", "overwrite"),
    of=HealWords,
)
def heal(
    terminal: Terminal,
    artifact: Annotated[
        Path, typer.Argument(metavar="OUT", help="A compressed folder, in native numbers.")
    ],
    text: Annotated[
        str, typer.Option("--text", metavar="SOURCE", help="To train on, as for compress.")
    ],
    output: options.OutputFolder,
    **words: Any,
) -> None:
    """Train the factors of OUT on a text; ranks, storage and bytes stay.

    An eighth of the windows is held out: training ends when they gain no more, and the best state
    is kept, the untrained one included.
    """
    with terminal.working(output=output) as progress:
        from spectrim import api

        given = {"output": output, "progress": progress, **options.given(**words)}
        healed = api.heal(artifact, text=text, **given)
    entry = {**healed.report["healing"][-1], "output": str(output)}
    terminal.show(entry, print_healing, healed.report["model"])


def print_healing(entry: dict[str, Any], model: str) -> None:
    """Print what was trained, and what held-out windows say of it."""
    from spectrim.cli.progress import format_seconds
    from spectrim.cli.render import print_facts

    print_facts(
        {
            "trained": f"{entry['parts']}, {entry['loss']}",
            "held out": f"{entry['before']:.4f} -> {entry['after']:.4f} nats per token, "
            f"{entry['held_out_windows']} windows",
            "notes": entry["notes"],
            "time": format_seconds(entry["seconds"]),
            "output": entry["output"],
            "next": f"spectrim evaluate {entry['output']} --against {model}",
        }
    )
