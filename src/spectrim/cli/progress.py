"""Progress of long runs: bars with time left on a terminal, plain lines otherwise.

The library calls whatever it is handed: `start(stage, total)`, `advance(stage, note)`,
`finish(stage)`, and once `expect(seconds)` with what its stages are predicted to take. It never
knows which of the three kinds below it talks to.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TextIO

from spectrim.run import progress as run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 5.0
WIDTH_FOR_NOTES = 70


class Progress(run.Progress, Protocol):
    """What the library calls, and the command line at the end."""

    def close(self) -> None:
        """Nothing will follow; called by the command line, also after an error."""


@dataclass
class Stage:
    """A running stage; times are seconds of a monotonic clock."""

    total: int
    began: float
    spoke: float
    done: int = 0


class Forecast:
    """Time left of a whole run: first as predicted, then corrected by what its stages took."""

    TRUSTED = 0.1
    """From this share of a run on its own pace alone counts."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.expected: dict[str, float] = {}
        self.shares: dict[str, float] = {}
        self.began = clock()

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Begin anew with these stages."""
        self.expected = {stage: max(value, 0.0) for stage, value in seconds.items()}
        self.shares, self.began = {}, self.clock()

    def note(self, stage: str, share: float) -> None:
        """So much of a stage is done; the stages before it are over."""
        if stage in self.expected:
            self.shares[stage] = share

    @property
    def total(self) -> float:
        """Predicted seconds of all stages."""
        return sum(self.expected.values())

    @property
    def done(self) -> float:
        """Predicted seconds of what is done."""
        return sum(self.expected[stage] * share for stage, share in self.shares.items())

    def left(self) -> float:
        """Seconds until the run is over."""
        if not self.done:
            return self.total
        pace = (self.clock() - self.began) / self.done
        trust = min(1.0, self.done / (self.TRUSTED * self.total))
        return (self.total - self.done) * (trust * pace + 1 - trust)

    def place(self, stage: str) -> str:
        """Which stage of how many, in words; empty for one that nobody expected."""
        if stage not in self.expected:
            return ""
        return f" ({list(self.expected).index(stage) + 1} of {len(self.expected)})"


class LineProgress:
    """Plain lines for logs and pipes: one per stage at its end, and one each few seconds."""

    def __init__(
        self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stream = stream or sys.stderr
        self.clock = clock
        self.stages: dict[str, Stage] = {}
        self.forecast = Forecast(clock)

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Say how long the run will take by the prediction."""
        self.forecast.expect(seconds)
        stages = "one stage" if len(seconds) == 1 else f"{len(seconds)} stages"
        self.write(f"about {format_seconds(self.forecast.total)} in {stages}")

    def start(self, stage: str, total: int) -> None:
        """Remember when the stage began; a short stage gets only its last line."""
        now = self.clock()
        self.stages[stage] = Stage(total, began=now, spoke=now)

    def advance(self, stage: str, note: str = "") -> None:
        """Count a step; speak if the last line is long enough ago."""
        state = self.stages[stage]
        state.done += 1
        self.forecast.note(stage, state.done / max(state.total, 1))
        now = self.clock()
        # The last step speaks through `finish`.
        if now - state.spoke < SECONDS_BETWEEN_LINES or state.done >= state.total:
            return
        state.spoke = now
        if stage in self.forecast.expected:
            left = f"{format_seconds(self.forecast.left())} of the run left"
        else:
            elapsed = now - state.began
            left = elapsed / state.done * max(state.total - state.done, 0)
            left = f"{format_seconds(left)} left"
        line = f"{stage}{self.forecast.place(stage)}: {state.done}/{state.total}, {left}"
        self.write(f"{line}, {note}" if note else line)

    def finish(self, stage: str) -> None:
        """Say how long the stage took."""
        state = self.stages.pop(stage)
        self.forecast.note(stage, 1.0)
        self.write(f"{stage}: done in {format_seconds(self.clock() - state.began)}")

    def close(self) -> None:
        """Nothing to undo."""

    def write(self, line: str) -> None:
        """One line, visible at once even through a pipe."""
        print(line, file=self.stream, flush=True)


class BarProgress:
    """One bar per running stage on a terminal; a finished stage leaves one line above the bars."""

    def __init__(self, console: Console) -> None:
        from rich import progress as rich_progress

        columns: list[rich_progress.ProgressColumn] = [
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=None),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeRemainingColumn(compact=True),
        ]
        if console.width >= WIDTH_FOR_NOTES:
            columns.append(rich_progress.TextColumn("{task.fields[note]}", markup=False))
        self.bars = rich_progress.Progress(*columns, console=console, transient=True, expand=True)
        self.tasks: dict[str, TaskID] = {}
        self.began: dict[str, float] = {}
        self.totals: dict[str, Stage] = {}
        self.forecast = Forecast(time.monotonic)
        self.whole: TaskID | None = None

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Add a bar for the whole run."""
        self.forecast.expect(seconds)
        self.bars.start()
        self.whole = self.bars.add_task("whole run", total=len(seconds), note="")
        self.show_left()

    def show_left(self) -> None:
        """Move the bar of the whole run."""
        if self.whole is not None and self.forecast.total:
            share = self.forecast.done / self.forecast.total
            left = format_seconds(self.forecast.left())
            self.bars.update(
                self.whole,
                completed=share * len(self.forecast.expected),
                description=f"whole run, {left} left",
            )

    def start(self, stage: str, total: int) -> None:
        """Add a bar; the display itself starts with the first one."""
        self.remove(stage)
        self.bars.start()
        self.tasks[stage] = self.bars.add_task(stage, total=total, note="")
        self.began[stage] = time.monotonic()
        self.totals[stage] = Stage(total, began=0.0, spoke=0.0)

    def advance(self, stage: str, note: str = "") -> None:
        """Move the stage's bar by one step."""
        self.bars.update(self.tasks[stage], advance=1, note=note)
        self.totals[stage].done += 1
        self.forecast.note(stage, self.totals[stage].done / max(self.totals[stage].total, 1))
        self.show_left()

    def finish(self, stage: str) -> None:
        """Replace the bar by a line."""
        elapsed = format_seconds(time.monotonic() - self.began[stage])
        self.remove(stage)
        self.forecast.note(stage, 1.0)
        self.show_left()
        self.bars.console.print(f"{stage}: done in {elapsed}", markup=False, highlight=False)

    def remove(self, stage: str) -> None:
        """Drop a stage's bar if there is one."""
        task = self.tasks.pop(stage, None)
        if task is not None:
            self.bars.remove_task(task)

    def close(self) -> None:
        """Give the terminal back."""
        self.bars.stop()


def format_seconds(seconds: float) -> str:
    """Seconds as people read them: `0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
