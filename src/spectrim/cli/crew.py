"""The command line among several processes: only the leader speaks, and one failure ends all."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from spectrim.cli.progress import Progress
from spectrim.distributed.placement import placement
from spectrim.errors import InputError, SpectrimError

if TYPE_CHECKING:
    from spectrim.distributed.team import Team

SHARED_COMMANDS = ("compress", "survey")
"""Commands whose work several processes can share."""

EXIT_REFUSED = 2


def check_alone(command: str | None) -> None:
    """Refuse a command that every one of several processes would do in full.

    Raises:
        InputError: torchrun has started several processes of it.
        typer.Exit: on the others, which say nothing.
    """
    place = placement()
    if place.size == 1 or command in SHARED_COMMANDS:
        return
    if place.rank > 0:
        raise typer.Exit(EXIT_REFUSED)
    raise InputError(
        f"`spectrim {command}` runs in one process, and torchrun started {place.size}; start it "
        f"without torchrun (several processes share {' and '.join(SHARED_COMMANDS)})"
    )


def answer_at_once(words: Mapping[str, Any]) -> None:
    """Refuse wrong words before torch is imported; to several processes their crew says it, once.

    Raises:
        SpectrimError: see `run.resolving.check_words`.
    """
    if placement().size == 1:
        from spectrim.run.resolving import check_words

        check_words(words)


@contextmanager
def crew(device: str | None, progress: Progress) -> Iterator[Team]:
    """The team of a command's processes; of one where torchrun has started no more.

    Among several an error is one line that names the rank, said by the leader.
    """
    from spectrim.distributed.launch import membership

    def tell(message: str) -> None:
        progress.close()
        line = " ".join(message.split())
        print(f"error: {line}", file=sys.stderr, flush=True)

    try:
        with membership(device=device or "auto", tell=tell) as team:
            yield team
    except SpectrimError:
        if placement().size == 1:
            raise
        # It has been told.
        raise typer.Exit(EXIT_REFUSED) from None
