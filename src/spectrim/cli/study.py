"""Options and tables that the studies share: several recipes, sizes and one evaluation text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectrim.cli import options
from spectrim.cli.words import CALIBRATING
from spectrim.errors import InputError

if TYPE_CHECKING:
    from spectrim.studies import Measure

Results = Annotated[
    list[Path] | None,
    typer.Argument(metavar="OUT...", help="Folders of compressed models.", show_default=False),
]


def names(text: str | None) -> list[str]:
    """`a,b` as a list, empty if nothing was given."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def numbers(option: str, words: str | None, *, least: int) -> list[int] | None:
    """`8,16,32` as numbers, None if nothing was given."""
    if words is None:
        return None
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise InputError(f"{option} is {words!r}; expected numbers from {least}, such as 8,16,32")
    return [int(part) for part in parts]


def as_length(words: str | None) -> Any:
    """`2048` as a number, `max` as it is."""
    if words is None or words == "max":
        return words
    if not words.isdigit():
        raise InputError(f"--window-length is {words!r}; expected a number of tokens or max")
    return int(words)


def measure(words: Mapping[str, Any], progress: Any) -> Measure:
    """The evaluation protocol of a study from its options."""
    from spectrim.run.options import RunOptions
    from spectrim.studies import Measure

    placed = {name: words[name] for name in ("device", "dtype", "trust_remote_code")}
    return Measure(
        **options.given(
            text=words["evaluation_text"],
            window_length=as_length(words["evaluation_length"]),
            max_tokens=words["max_tokens"],
            options=RunOptions(progress=progress, **options.given(**placed)),
        )
    )


def calibration(words: Mapping[str, Any]) -> dict[str, Any]:
    """What was said about the runs of a study."""
    return options.given(**{name: words.get(name) for name in ("keep", *CALIBRATING)})


def print_curve(record: dict[str, Any], output: Path) -> None:
    """Print the points and where the pictures are."""
    from spectrim.cli.render import print_facts, print_table
    from spectrim.sizes import format_bytes

    print_table(
        ("recipe", "keep", "model", "bits", "perplexity", "nats more", "KL", "same top"),
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
            "bits": "stored, per original target weight",
            **{f"skipped {name}": why for name, why in record["skipped"].items()},
            "output": output,
        }
    )


def print_comparison(record: dict[str, Any], output: Path | None) -> None:
    """Print the table with the best of every size in bold; its files have the other columns."""
    from rich.text import Text

    from spectrim.cli.render import print_facts, print_note, print_table

    rows = []
    for entry in record["entries"]:
        low, high = entry["excess_low"], entry["excess_high"]
        interval = "" if low is None else f" [{low:+.3f}, {high:+.3f}]"
        cells = (
            str(entry["recipe"]),
            f"{entry['achieved']:.3f}",
            f"{entry['perplexity']:.5g}",
            f"{entry['excess']:+.3f}{interval}",
            f"{entry['kl']:.3f}",
            f"{entry['seconds']:.0f}",
            "best" if entry["best"] else "as good" if entry["within_noise"] else "",
        )
        rows.append([Text(cell, style="bold" if entry["best"] else "") for cell in cells])
    print_table(("recipe", "keep", "perplexity", "nats more", "KL", "seconds", ""), rows)
    print_note(
        f"dense perplexity {record['dense']['perplexity']:.3f}; intervals are 95 %, from a paired "
        "bootstrap over windows, 'as good' cannot be told from the best of its size; every recipe "
        "ran in its own process"
    )
    print_facts({**{f"failed {n}": why for n, why in record["failed"].items()}, "output": output})


def print_tasks(results: list[dict[str, Any]]) -> None:
    """Print accuracies of zero-shot tasks, tasks down and models across, and what was skipped.

    Below each model that is held against a dense one stand the paired differences from it.
    """
    from spectrim.cli.render import print_note, print_table
    from spectrim.cli.results import short_names

    found = [r["zero_shot"] for r in results if "zero_shot" in r]
    models = short_names([r["model"] for r in results if "zero_shot" in r])
    names = list(dict.fromkeys(name for record in found for name in record["tasks"]))
    columns: dict[str, list[str]] = {}
    for model, record in zip(models, found, strict=True):
        columns[model] = [accuracy_words(record["tasks"].get(name)) for name in names]
        mean = {"accuracy": record["mean"], "standard_error": record["mean_standard_error"]}
        columns[model].append(accuracy_words(mean))
        paired = record.get("difference")
        if paired is not None:
            cells = [accuracy_words(paired["tasks"].get(name), sign="+") for name in names]
            mean = {"accuracy": paired["mean"], "standard_error": paired["mean_standard_error"]}
            columns[f"{model} - dense"] = [*cells, accuracy_words(mean, sign="+")]
    if names:
        rows = list(zip([*names, "mean"], *columns.values(), strict=True))
        print_table(("accuracy, %", *columns), rows, title="zero-shot tasks")
    if any("difference" in record for record in found):
        print_note("differences are paired over questions, with their standard errors")
    for reason in dict.fromkeys(why for r in results for why in r.get("skipped", {}).values()):
        print_note(f"skipped: {reason}")


def accuracy_words(task: dict[str, Any] | None, *, sign: str = "") -> str:
    """An accuracy with its standard error, in percent."""
    if task is None or task["accuracy"] is None:
        return "-"
    error = task["standard_error"]
    words = f"{100 * task['accuracy']:{sign}.1f}"
    return words if error is None else f"{words} ± {100 * error:.1f}"
