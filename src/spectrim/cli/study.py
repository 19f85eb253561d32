"""Options and tables that the studies share: several recipes, sizes and one evaluation text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.cli import options
from spectrim.errors import InputError

if TYPE_CHECKING:
    from spectrim.studies import Measure

__all__ = [
    "EvaluationLength",
    "EvaluationText",
    "MaxTokens",
    "Objectives",
    "Recipes",
    "Results",
    "as_length",
    "measure",
    "names",
    "numbers",
    "print_comparison",
    "print_curve",
    "print_tasks",
]

Recipes = Annotated[
    str | None,
    typer.Option("--recipes", metavar="A,B,...", help="Recipes by name, or YAML files."),
]
Results = Annotated[
    list[Path] | None,
    typer.Argument(metavar="OUT...", help="Folders of compressed models.", show_default=False),
]
Objectives = Annotated[
    str | None,
    typer.Option(
        "--objectives",
        metavar="A,B,...",
        help="Objectives to run block by block with equal ranks: plain, whitened, shifted, ...",
    ),
]
EvaluationText = Annotated[
    str | None,
    typer.Option(
        "--evaluation-text",
        metavar="SOURCE",
        help="Text to measure on: wikitext2 (the default), c4, ptb, FILE.txt or FILE.jsonl.",
    ),
]
EvaluationLength = Annotated[
    str | None,
    typer.Option(
        "--evaluation-length",
        metavar="TOKENS|max",
        help="Tokens per evaluation window; default 2048 or the model's longest.",
    ),
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", help="Score at most N tokens.")
]


def names(text: str | None) -> list[str]:
    """`a,b` as a list, empty if nothing was given."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbers(option: str, words: str | None, *, least: int) -> list[int] | None:
    """`8,16,32` as numbers, None if nothing was given."""
    if words is None:
        return None
    parts = names(words)
    if not parts or not all(part.isdecimal() and int(part) >= least for part in parts):
        raise InputError(f"{option} is {words!r}; expected numbers from {least}, such as 8,16,32")
    return [int(part) for part in parts]


def as_length(words: str | None) -> Any:
    """`2048` as a number, `max` as it is."""
    if words is None or words == "max":
        return words
    if not words.isdigit():
        raise InputError(f"the window length is {words!r}; expected a number of tokens or max")
    return int(words)


def measure(
    text: str | None,
    length: str | None,
    max_tokens: int | None,
    device: str | None,
    dtype: str | None,
    trust_remote_code: bool,
) -> Measure:
    """The evaluation protocol of a study from its options."""
    from spectrim.studies import Measure

    return Measure(
        trust_remote_code=trust_remote_code,
        **options.given(
            text=text,
            window_length=as_length(length),
            max_tokens=max_tokens,
            device=device,
            dtype=dtype,
        ),
    )


def print_curve(record: dict[str, Any], output: Path) -> None:
    """Print the points and where the pictures are."""
    from spectrim.cli.render import format_bytes, print_facts, print_table

    print_table(
        ("recipe", "keep", "model", "bits/weight", "perplexity", "nats above dense", "KL", "same"),
        [
            (
                point["recipe"],
                f"{point['achieved']:.3f}",
                format_bytes(point["model_bytes"]),
                f"{point['bits_per_weight']:.2f}",
                f"{point['perplexity']:.3f}",
                f"{point['excess']:+.4f}",
                f"{point['kl']:.4f}",
                f"{point['top1']:.1%}",
            )
            for point in record["points"]
        ],
    )
    print_facts(
        {
            "dense": f"perplexity {record['dense']['perplexity']:.3f}",
            **{f"skipped {name}": why for name, why in record["skipped"].items()},
            "output": output,
        }
    )


def print_comparison(record: dict[str, Any], output: Path | None) -> None:
    """Print the table with the best of every size in bold."""
    from rich.text import Text

    from spectrim.cli.render import print_facts, print_note, print_table
    from spectrim.report.tables import COMPARISON_HEADERS, comparison_rows

    rows = comparison_rows(record["entries"])
    styles = ["bold" if entry["best"] else "" for entry in record["entries"]]
    print_table(
        COMPARISON_HEADERS,
        [[Text(cell, style=s) for cell in row] for row, s in zip(rows, styles, strict=True)],
    )
    print_note(
        f"dense perplexity {record['dense']['perplexity']:.3f}; intervals are 95 %, from a paired "
        "bootstrap over windows; every recipe ran in its own process"
    )
    print_facts({**{f"failed {n}": why for n, why in record["failed"].items()}, "output": output})


def print_tasks(results: list[dict[str, Any]]) -> None:
    """Print accuracies of zero-shot tasks, tasks down and models across, and what was skipped."""
    from spectrim.cli.render import print_note, print_table

    found = [(r["model"], r["zero_shot"]) for r in results if "zero_shot" in r]
    names = list(dict.fromkeys(name for _, record in found for name in record["tasks"]))
    if names:
        rows = [
            (name, *(accuracy_words(record["tasks"].get(name)) for _, record in found))
            for name in names
        ]
        means = [
            {"accuracy": r["mean"], "standard_error": r["mean_standard_error"]} for _, r in found
        ]
        rows.append(("mean", *(accuracy_words(mean) for mean in means)))
        print_table(("accuracy", *(name for name, _ in found)), rows, title="zero-shot tasks")
    for reason in dict.fromkeys(why for r in results for why in r.get("skipped", {}).values()):
        print_note(f"skipped: {reason}")


def accuracy_words(task: dict[str, Any] | None) -> str:
    """An accuracy with its standard error, in percent."""
    if task is None or task["accuracy"] is None:
        return "-"
    error = task["standard_error"]
    words = f"{100 * task['accuracy']:.1f}"
    return words if error is None else f"{words} ± {100 * error:.1f}"
