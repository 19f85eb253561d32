"""Progress: few lines in a log, a time left that is right, bars that fit narrow terminals."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from spectrim.cli.progress import (
    BarProgress,
    Forecast,
    LineProgress,
    format_seconds,
)
from spectrim.run.progress import Silent


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_long_stage_speaks_every_five_seconds_and_at_its_end():
    clock, stream = Clock(), io.StringIO()
    progress = LineProgress(stream, clock)
    progress.start("moments", 40)
    for step in range(40):
        clock.now += 1.0
        progress.advance("moments", f"block {step}")
    progress.finish("moments")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 40 // 5
    assert lines[0] == "moments: 5/40, 35 s left, block 4"
    assert lines[-1] == "moments: done in 40 s"


def test_a_short_stage_gets_one_line():
    clock, stream = Clock(), io.StringIO()
    progress = LineProgress(stream, clock)
    progress.start("plan", 2)
    progress.advance("plan")
    clock.now += 0.25
    progress.advance("plan")
    progress.finish("plan")
    assert stream.getvalue() == "plan: done in 0.2 s\n"


def test_stages_are_counted_apart_and_can_begin_again():
    clock, stream = Clock(), io.StringIO()
    progress = LineProgress(stream, clock)
    for _ in range(2):
        progress.start("outer", 2)
        progress.start("inner", 1)
        progress.advance("inner")
        progress.finish("inner")
        clock.now += 6
        progress.advance("outer")
        progress.finish("outer")
    assert stream.getvalue().splitlines() == 2 * [
        "inner: done in 0.0 s",
        "outer: 1/2, 6.0 s left",
        "outer: done in 6.0 s",
    ]


@pytest.mark.parametrize("width", [40, 120])
def test_bars_fit_the_terminal(width: int):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=width, color_system=None)
    progress = BarProgress(console)
    progress.start("decompose", 3)
    progress.advance("decompose", "a note [that] is not markup")
    shown = console.render_lines(progress.bars.get_renderable(), pad=False)
    text = "".join(segment.text for line in shown for segment in line)
    assert "1/3" in text
    assert ("[that]" in text) == (width >= 70)
    assert all(sum(segment.cell_length for segment in line) <= width for line in shown)
    progress.finish("decompose")
    progress.close()
    assert "decompose: done in" in stream.getvalue()


def test_quiet_means_silent(capfd: pytest.CaptureFixture[str]):
    progress = Silent()
    progress.start("a", 1)
    progress.advance("a", "note")
    progress.finish("a")
    progress.close()
    assert capfd.readouterr() == ("", "")


def test_seconds_read_like_a_person_says_them():
    spoken = [format_seconds(value) for value in (0.04, 9.94, 12.4, 59.4, 185, 7620)]
    assert spoken == ["0.0 s", "9.9 s", "12 s", "59 s", "3 min 05 s", "2 h 07 min"]


def test_the_forecast_begins_as_predicted_and_ends_as_measured():
    now = [0.0]
    forecast = Forecast(lambda: now[0])
    forecast.expect({"a": 10.0, "b": 30.0})
    assert forecast.left() == 40.0
    for step in range(1, 11):  # everything takes twice as long as predicted
        now[0] = 2.0 * step
        forecast.note("a", step / 10)
    assert forecast.left() == pytest.approx(60.0)
    now[0] = 20.0 + 30.0
    forecast.note("b", 0.5)
    assert forecast.left() == pytest.approx(15.0 * 50 / 25)
    assert forecast.place("b") == " (2 of 2)" and forecast.place("other") == ""


def test_lines_say_what_is_left_of_the_whole_run():
    now, stream = [0.0], io.StringIO()
    progress = LineProgress(stream, lambda: now[0])
    progress.expect({"gradients": 60.0, "compress": 120.0})
    progress.start("gradients", 4)
    now[0] = 30.0
    progress.advance("gradients")
    first, second = stream.getvalue().splitlines()
    assert first == "about 3 min 00 s in 2 stages"
    # A quarter of 60 s took 30 s: twice as long as predicted.
    assert second.startswith("gradients (1 of 2): 1/4, 5 min")
    assert "of the run left" in second
