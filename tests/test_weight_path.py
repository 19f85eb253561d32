"""The page "one weight matrix, from file to file" is what a default run does, in that order."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import spectrim
from architectures import tiny, windows
from spectrim import api
from spectrim.model.anatomy import Target

ROOT = Path(__file__).parents[1]
SOURCE = str(Path(spectrim.__file__).parent) + "/"
WATCHED = "model.layers.1.mlp.up_proj"
MOST_STOPS = 25


def stops():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| `([\w/.]+)` \| `([\w.]+)` \|", page, re.MULTILINE)
    return [(file, name.rpartition(".")[2]) for file, name in rows]


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """Calls of the stops in their order, and the files that were handed the watched target."""
    folder = tmp_path_factory.mktemp("walk")
    model = tiny("llama")[0]
    model.save_pretrained(folder / "dense")
    wanted, calls, handed = set(stops()), [], set()

    def trace(frame, event, _):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(SOURCE):
            return
        file = code.co_filename.removeprefix(SOURCE)
        if (file, code.co_name) in wanted:
            calls.append((file, code.co_name))
        named = frame.f_locals.get("target")
        if isinstance(named, Target) and named.name == WATCHED:
            handed.add(file)

    sys.setprofile(trace)
    try:
        text = windows(8, 16)
        options = {"text": text, "output": folder / "out", "measure": False}
        result = api.compress(folder / "dense", keep=0.6, **options)
    finally:
        sys.setprofile(None)
    assert result.plan[WATCHED].rank is not None
    return calls, handed


def test_the_page_has_few_stops_and_all_of_them_exist():
    found = stops()
    assert 15 < len(found) <= MOST_STOPS
    for file, name in found:
        text = (ROOT / "src" / "spectrim" / file).read_text(encoding="utf-8")
        assert re.search(rf"^\s*def {name}\(", text, re.MULTILINE), (file, name)


def test_a_default_run_passes_the_stops_in_their_order(walked):
    calls = iter(walked[0])
    for stop in stops():
        assert any(call == stop for call in calls), f"{stop} is not met where the page has it"


def test_no_file_that_is_handed_the_matrix_is_left_out(walked):
    assert walked[1] <= {file for file, _ in stops()}
