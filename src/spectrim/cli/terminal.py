"""How a command speaks to whoever started it: `--json`, `--verbose` and `--quiet`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from spectrim.cli.progress import Progress

OPTIONS: dict[str, Any] = {
    "as_json": Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")],
    "verbose": Annotated[bool, typer.Option("-v", "--verbose", help="Log every step to stderr.")],
    "quiet": Annotated[bool, typer.Option("-q", "--quiet", help="No progress, only warnings.")],
}
"""Which the command line has for them, in their order."""


@dataclass(frozen=True)
class Terminal:
    """What the user said of it.

    Attributes:
        as_json: results are for a program.
        verbose: every step is logged.
        quiet: no progress is shown.
    """

    as_json: bool = False
    verbose: bool = False
    quiet: bool = False

    def working(self, **place: Any) -> AbstractContextManager[Progress]:
        """What surrounds the work of a command, see `cli.session.session` for its place."""
        from spectrim.cli.session import session

        return session(verbose=self.verbose, quiet=self.quiet or self.as_json, **place)

    def show(self, record: Any, to_people: Callable[..., None], *more: Any) -> None:
        """Print a record as JSON, or by `to_people`, which gets `more` as well."""
        from spectrim.cli.render import print_json

        if self.as_json:
            print_json(record)
        else:
            to_people(record, *more)
