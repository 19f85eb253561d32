"""`spectrim adapter`: the difference of two models as a LoRA folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.words import takes
from spectrim.run.reading_words import AdapterWords

__all__ = ["adapter"]


@takes(
    *("rank", "metric", "allow_differences", "text", "windows", "window_length", "seed", "batch"),
    *("device", "dtype", "trust_remote_code", "overwrite"),
    of=AdapterWords,
)
def adapter(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="The model to adapt; may be compressed.")
    ],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The model to come close to.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Folder to write to.")
    ],
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
    **words: Any,
) -> None:
    """Write the best low-rank difference between MODEL and BASE as a LoRA adapter for BASE.

    It repairs a rounded or compressed BASE, or extracts what MODEL was tuned to.
    """
    from spectrim.cli.session import session

    with session(verbose=verbose, quiet=quiet or as_json, output=output) as progress:
        from spectrim import api

        made = api.adapter(
            base,
            model,
            output=output,
            progress=progress,
            **options.given(**words),
        )
    from spectrim.cli.render import print_facts, print_json

    facts = made.facts
    if as_json:
        print_json({**facts, "output": str(output)})
        return
    share = 1 - facts["left"] / facts["difference"]
    said = {
        "adapter": f"rank {facts['rank']} in {len(facts['targets'])} layers of {facts['base']}",
        "metric": facts["objective"],
        "of the difference": f"{share:.1%} ({facts['unit']})",
        "not held": ", ".join(facts["outside"]) or None,
        "notes": "; ".join(facts["notes"]) or None,
    }
    if facts["calibration"] is None:
        said["metric"] = "plain SVD of the weights: no --text was given to weigh errors by"
    for one in facts["measured"]:
        said[f"perplexity, {one['kind']}"] = ", ".join(
            f"{which} {one[which]['perplexity']:.2f}" for which in ("base", "adapted", "model")
        )
    print_facts({**said, "output": output})
