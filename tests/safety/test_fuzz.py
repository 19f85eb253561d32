"""Whatever happens to a file, its reader gives a sound object or a `SpectrimError`, and no more.

Examples are drawn without randomness: the same ones in every run, a few seconds in all.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from safety.artifacts import ARTIFACTS, Artifact
from safety.mutations import BOUNDED, damaged_bytes, damaged_json, everything_in
from spectrim.errors import SpectrimError
from spectrim.report import page
from spectrim.report.content import read_result


@dataclass
class Ready:
    """An artifact on disk, what is in its files, and what its reader says of it undamaged."""

    artifact: Artifact
    folder: Path
    contents: dict[Path, bytes]
    outcome: Any


@pytest.fixture(scope="module", params=ARTIFACTS, ids=lambda a: a.name)
def ready(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.name) / "inside"
    request.param.write(folder)
    return Ready(request.param, folder, everything_in(folder), request.param.read(folder))


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor | np.ndarray):
        return one.shape == other.shape and bool((one == other).all())
    return one == other


def test_an_undamaged_file_is_read_the_same_twice(ready):
    assert same(ready.artifact.read(ready.folder), ready.outcome)


@BOUNDED
@given(data=st.data())
def test_damage_gives_a_sound_object_or_a_typed_error(ready, data):
    path = data.draw(st.sampled_from([p for p in ready.contents if ready.artifact.reads(p)]))
    raw = ready.contents[path]
    if path.suffix == ".json" and data.draw(st.booleans()):
        changed = data.draw(damaged_json(json.loads(raw)))
    else:
        changed = data.draw(damaged_bytes(raw))
    path.write_bytes(changed)
    try:
        found = ready.artifact.read(ready.folder)
    except SpectrimError as error:
        assert str(error)
    else:
        ready.artifact.sound(found)
        if changed == raw:
            assert same(found, ready.outcome)
    finally:
        path.write_bytes(raw)
    # Nothing was written, in the folder or beside it.
    assert everything_in(ready.folder.parent) == ready.contents


@BOUNDED
@given(data=st.data())
def test_a_page_is_made_of_every_report_that_is_accepted(tmp_path, monkeypatch, data):
    monkeypatch.setattr(page, "pictures_of", lambda content: [])
    artifact = next(a for a in ARTIFACTS if a.name == "report")
    if not (tmp_path / "r").exists():
        artifact.write(tmp_path / "r")
        (tmp_path / "report.json").write_bytes((tmp_path / "r/spectrim_report.json").read_bytes())
    good = json.loads((tmp_path / "report.json").read_bytes())
    (tmp_path / "r/spectrim_report.json").write_bytes(data.draw(damaged_json(good)))
    try:
        content = read_result(tmp_path / "r")
    except SpectrimError:
        return
    html = page.render_page(content)
    assert "<script" not in html and "onerror=" not in html
    html.encode("utf-8")
