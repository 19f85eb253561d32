"""What surrounds every command: log and progress on stderr, and a clean end when interrupted."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from spectrim.cli.progress import BarProgress, LineProgress, Progress
from spectrim.run.progress import Silent

if TYPE_CHECKING:
    from rich.console import Console

EXIT_INTERRUPTED = 130


@contextmanager
def session(
    *,
    verbose: bool = False,
    quiet: bool = False,
    output: Path | None = None,
    resumes: bool = False,
    work: Path | None = None,
) -> Iterator[Progress]:
    """Set up logging, hand out a progress display, and say what an interruption leaves behind.

    Args:
        verbose: log at debug level.
        quiet: no progress, only warnings and errors.
        output: the path the command writes; what lies there is compared after Ctrl-C.
        resumes: whether the command goes on from what it leaves in `output` or `OUTPUT.work`.
        work: the user's folder for unfinished work, instead of those.

    Yields:
        The progress display for the library to call.

    Raises:
        typer.Exit: with code 130 after a KeyboardInterrupt.
    """
    from rich.console import Console

    from spectrim.distributed.placement import placement

    console = Console(stderr=True, highlight=False)
    follows = placement().rank > 0
    quiet = quiet or follows
    set_up_logging(console, verbose=verbose and not follows, quiet=quiet)
    silence_foreign_bars()
    if not verbose:
        # Of data sets in Python, which task files may have, ours among them; of every time that
        # the hub is asked again, before the error that we say in our words.
        for name in ("lm_eval", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)
    progress = new_progress(console, quiet=quiet)
    before = neighbors(output)
    try:
        yield progress
    except KeyboardInterrupt:
        progress.close()
        if follows:
            raise typer.Exit(EXIT_INTERRUPTED) from None
        left = left_behind(before, neighbors(output))
        chosen = work is not None and work.exists()
        kept = work if chosen else kept_in(output) if resumes else None
        if kept is not None:
            left += f"; what is finished stays in {kept}, and the same command goes on from there"
        print(f"interrupted: {left}", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        progress.close()


def set_up_logging(console: Console, *, verbose: bool, quiet: bool) -> None:
    """Send the library's log to the console the progress bars use, so that they do not clash.

    Only ours: the root logger stays as it is, since other libraries bring their own handlers and
    would say everything twice.
    """
    from rich.logging import RichHandler

    handler = RichHandler(
        console=console, show_time=verbose, show_path=False, markup=False, rich_tracebacks=False
    )
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("spectrim")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def silence_foreign_bars() -> None:
    """Switch other libraries' own bars off: they would write across ours, stage by stage.

    The hub, datasets, transformers and tqdm (lm-eval's bars) read these variables when they are
    imported, which happens after this call. A user who sets them has the last word.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TQDM_DISABLE", "1")


def new_progress(console: Console, *, quiet: bool) -> Progress:
    """Bars on a terminal, lines otherwise, nothing if asked to be quiet."""
    if quiet:
        return Silent()
    return BarProgress(console) if console.is_terminal else LineProgress(sys.stderr)


def kept_in(output: Path | None) -> Path | None:
    """Where the finished part of an output lies: beside it, or in it where it grows in place."""
    if output is None:
        return None
    beside = output.with_name(f"{output.name}.work")
    return next((path for path in (beside, output) if path.exists()), None)


def neighbors(output: Path | None) -> dict[Path, int]:
    """What lies where `output` goes, partial folders named after it included, with times."""
    if output is None or not output.absolute().parent.is_dir():
        return {}
    siblings = output.absolute().parent.iterdir()
    return {path: path.lstat().st_mtime_ns for path in siblings if output.name in path.name}


def left_behind(before: dict[Path, int], after: dict[Path, int]) -> str:
    """What appeared or changed, in words."""
    names = sorted(str(path) for path, time in after.items() if before.get(path) != time)
    if not names:
        return "nothing was left behind"
    return f"left behind: {', '.join(names)}"
