"""Options that several commands share, so that a word means the same everywhere.

Options that are None are not passed on: every default lives in the recipe or in `spectrim.api`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = [
    "Against",
    "AsJson",
    "Batch",
    "Device",
    "Dtype",
    "Keep",
    "Model",
    "OutOfCore",
    "Output",
    "Overwrite",
    "Quiet",
    "RecipeName",
    "Seed",
    "Size",
    "Text",
    "TrustRemoteCode",
    "Verbose",
    "WindowLength",
    "Windows",
    "given",
]

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Model name on the Hugging Face hub, or a folder.")
]
Output = Annotated[
    Path, typer.Option("-o", "--output", metavar="OUT", help="Folder to write the result to.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace OUT if it exists and is not empty.")
]
Keep = Annotated[
    float | None,
    typer.Option(
        "--keep", metavar="FRACTION", help="Fraction of the targets' bytes that remains, in (0, 1]."
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size", metavar="BYTES", help='Size of the whole checkpoint, e.g. "3.5GB", for --keep.'
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe", metavar="NAME|FILE", help="A recipe by name (`spectrim recipes`) or YAML file."
    ),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="SOURCE",
        help="wikitext2, c4, ptb, self (sampled from the model), FILE.txt or FILE.jsonl.",
    ),
]
Windows = Annotated[
    int | None, typer.Option("--windows", metavar="N", help="Number of calibration windows.")
]
WindowLength = Annotated[
    int | None, typer.Option("--window-length", metavar="TOKENS", help="Tokens per window.")
]
Batch = Annotated[
    int | None,
    typer.Option("--batch", metavar="N", help="Windows per pass; by default it follows memory."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of all randomness.")]
Device = Annotated[
    str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps, ...; default auto.")
]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", help="auto (as stored), float32, bfloat16, float16; default auto."),
]
OutOfCore = Annotated[
    bool | None,
    typer.Option(
        "--out-of-core/--in-memory",
        help="Read blocks from the checkpoint one at a time; default where memory is short.",
    ),
]
Against = Annotated[
    str | None,
    typer.Option("--against", metavar="MODEL", help="The dense model to compare with."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Log every step to stderr.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress, only warnings.")]


def given(**options: Any) -> dict[str, Any]:
    """The options the user gave; the others keep the library's defaults."""
    return {name: value for name, value in options.items() if value is not None}
