"""Tables for people: plain when piped, and readable in a terminal of 40 columns."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PIPED_WIDTH = 240
PROSE_WIDTH = 100


def stdout_console() -> Console:
    """The console of results. A pipe has no width, so tables are not squeezed there."""
    from rich.console import Console

    width = None
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        width = PIPED_WIDTH
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False, width=width)


def print_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    title: str | None = None,
    words: int = 1,
) -> None:
    """Print rows as a table, or as one short block per row where the table is too wide.

    Args:
        headers: column names; the first column names the row.
        rows: cells as text, each row as long as `headers`.
        title: a line above the table.
        words: how many leading columns hold words (left-aligned); the others hold numbers.
    """
    from rich.measure import Measurement

    console = stdout_console()
    if title:
        console.print(title, style="bold")
    table = build_table(headers, rows, words)
    natural = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    if natural <= console.width:
        console.print(table)
        return
    for row in rows:
        console.print(row[0], style="bold", overflow="fold")
        for name, cell in zip(headers[1:], row[1:], strict=True):
            print_wrapped(console, f"{name}: {cell}", first="  ", rest="    ")


def build_table(headers: Sequence[str], rows: Sequence[Sequence[str | Text]], words: int) -> Table:
    """A rich table: words left, numbers right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 0, 0, 1), pad_edge=False, show_edge=False)
    for position, name in enumerate(headers):
        justify = "left" if position < words else "right"
        table.add_column(name, justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def print_facts(facts: Mapping[str, Any], *, title: str | None = None) -> None:
    """Print names and values, one pair per line, several values on lines below.

    None and empty lists are left out.
    """
    console = stdout_console()
    if title:
        console.print(title, style="bold")
    shown = {name: value for name, value in facts.items() if value is not None and value != []}
    width = max((len(name) for name in shown), default=0)
    for name, value in shown.items():
        if not isinstance(value, list):
            print_wrapped(console, f"{name:<{width}}  {value}", first="", rest="  ")
            continue
        console.print(name)
        for one in value:
            print_wrapped(console, one, first="  - ", rest="    ")


def print_note(text: str) -> None:
    """Print a paragraph, wrapped at the console's width."""
    console = stdout_console()
    for paragraph in text.splitlines():
        print_wrapped(console, paragraph, first="", rest="")


def print_wrapped(console: Console, text: str, *, first: str, rest: str) -> None:
    """Print one text with its further lines indented; a long path is never cut in two."""
    lines = textwrap.wrap(
        text,
        max(min(console.width, PROSE_WIDTH), len(rest) + 10),
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )
    for line in lines or [""]:
        console.print(line, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print JSON exactly as a program wants to read it: no wrapping, no color."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def format_count(count: int) -> str:
    """A whole number with thousands separated: `6,882,560`."""
    return f"{count:,}"


def storage_words(storage: str, weights: str) -> str:
    """`packed`, or `packed int8` where the numbers are not the model's own."""
    return storage if weights == "native" else f"{storage} {weights}"
