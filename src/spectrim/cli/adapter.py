"""`spectrim adapter`: the difference of two models as a LoRA folder."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.terminal import Terminal
from spectrim.cli.words import takes
from spectrim.run.reading_words import AdapterWords


@takes(
    *("rank", "metric", "allow_differences", "text", "windows", "window_length", "seed", "batch"),
    *("device", "dtype", "trust_remote_code", "overwrite"),
    of=AdapterWords,
)
def adapter(
    terminal: Terminal,
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model to adapt; may be compressed.")
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model to come close to.")],
    output: options.OutputFolder,
    **words: Any,
) -> None:
    """Write the best low-rank difference between MODEL and BASE as a LoRA adapter for BASE.

    It repairs a rounded or compressed BASE, or extracts what MODEL was tuned to.
    """
    with terminal.working(output=output) as progress:
        from spectrim import api

        given = {"output": output, "progress": progress, **options.given(**words)}
        made = api.adapter(base, model, **given)
    terminal.show({**made.facts, "output": str(output)}, print_adapter)


def print_adapter(facts: dict[str, Any]) -> None:
    """Print what the adapter holds, and how much of the difference."""
    from spectrim.cli.render import print_facts

    share = 1 - facts["left"] / facts["difference"]
    said = {
        "adapter": f"rank {facts['rank']} in {len(facts['targets'])} layers of {facts['base']}",
        "metric": facts["objective"],
        "of the difference": f"{share:.1%} ({facts['unit']})",
        "not held": ", ".join(facts["outside"]) or None,
        "notes": list(facts["notes"]),
    }
    if facts["calibration"] is None:
        said["metric"] = "plain SVD of the weights: no --text was given to weigh errors by"
    for one in facts["measured"]:
        said[f"perplexity, {one['kind']}"] = ", ".join(
            f"{which} {one[which]['perplexity']:.2f}" for which in ("base", "adapted", "model")
        )
    print_facts({**said, "output": facts["output"]})
