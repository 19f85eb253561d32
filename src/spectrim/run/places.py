"""Where a command writes: its output, locked for one process, and the work folder beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from spectrim.errors import OutputError
from spectrim.run.options import RunOptions
from spectrim.storage.atomic import check_output
from spectrim.storage.lock import locked
from spectrim.storage.ownership import Source, check_apart
from spectrim.storage.shared_work import SharedWork, Work
from spectrim.storage.work import (
    CHECKPOINTS,
    discard_work,
    open_work,
    remove_empty,
    work_beside,
)


@contextmanager
def places(
    output: str | Path | None, options: RunOptions, *, sources: Sequence[Source] = ()
) -> Iterator[Work | None]:
    """Hold the locks of an output and of its work folder for the time of the context.

    When the context ends well, the work beside the output is done with and removed; a folder that
    the user chose for it is kept. When it does not, what was finished stays for the next run.

    Args:
        output: what will be written; None for a result in memory.
        options: whether something may be there, and the user's folders for unfinished work (by
            default `OUT.work` beside the output, and none without `resume`) and hidden states; of
            a team, the leader holds the locks for all.
        sources: what the run reads, which lies elsewhere than all of these.

    Raises:
        OutputError: the output is taken, cannot be written, or another process works on it.
    """
    team, work, streams = options.team, options.work, options.offload_streams
    beside = None if output is None else work_beside(output)
    chosen = Path(work) if work is not None else beside if options.resume else None
    for place in (beside, chosen, streams):
        if place is not None:
            check_apart(place, sources)
    for place in (work, streams):
        if place is not None and output is not None:
            _check_outside(Path(place), Path(output))
    with ExitStack() as stack:
        if output is not None and team.leads:
            checked = check_output(output, overwrite=options.overwrite, sources=sources)
            _lock_output(stack, checked, output)
        folder = None
        if chosen is not None and team.leads:
            folder = stack.enter_context(open_work(chosen, place=output))
        if chosen is not None and team.size > 1:
            yield stack.enter_context(SharedWork(chosen, folder, team))
        else:
            yield folder
        if folder is not None and work is None:
            folder.clear(*CHECKPOINTS)
        elif beside is not None and team.leads:
            # An earlier run that was killed left it for this result, which is there now.
            discard_work(beside)


def _check_outside(place: Path, output: Path) -> None:
    inner, outer = place.resolve(), output.resolve()
    if inner == outer or outer in inner.parents:
        raise OutputError(
            f"{place} is or lies inside the output {output}, which is replaced as a whole when it "
            "is finished; choose a folder elsewhere"
        )


def _lock_output(stack: ExitStack, path: Path, output: str | Path) -> None:
    made = [p for p in path.parents if not p.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}") from error
    stack.callback(remove_empty, made)
    stack.enter_context(locked(path.with_name(f".{path.name}.lock"), place=output))
