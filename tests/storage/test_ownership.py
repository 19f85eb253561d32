"""What is read is never written over, and only what spectrim wrote is ever replaced."""

import os

import pytest

from spectrim.errors import OutputError, SpectrimError
from spectrim.storage.atomic import new_folder
from spectrim.storage.ownership import MANIFEST_FILE, check_apart, check_ours


@pytest.fixture
def model(tmp_path):
    """A folder as the hub's cache keeps it: its weights are a link to a file elsewhere."""
    folder = tmp_path / "hub" / "snapshots" / "main"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "abc").write_text("weights")
    (folder / "model.safetensors").symlink_to(tmp_path / "hub" / "blobs" / "abc")
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "up").mkdir()
    (tmp_path / "other").mkdir()
    return folder


@pytest.mark.parametrize(
    ("output", "relation"),
    [
        ("hub/snapshots/main", "is"),
        ("hub/snapshots/main/", "is"),
        ("up/../hub/snapshots/main", "is"),
        ("link", "is"),
        ("link/deep/out", "lies inside"),
        ("hub/snapshots/main/out", "lies inside"),
        ("hub/snapshots", "contains"),
        (".", "contains"),
        ("hub/blobs", "contains"),
        ("hub/blobs/abc", "contains"),
    ],
)
@pytest.mark.parametrize("spelled", ["hub/snapshots/main", "link", "up/../link/"])
def test_an_output_where_a_source_lies_is_refused(
    tmp_path, model, monkeypatch, output, relation, spelled
):
    from pathlib import Path

    monkeypatch.chdir(tmp_path)
    for place in (output, tmp_path / output):
        with pytest.raises(OutputError, match=f"{relation} the model"):
            check_apart(place, [("the model", Path(spelled))])


@pytest.mark.parametrize("output", ["other", "new", "hub/snapshots/main2", "hub/snapshots/mai"])
def test_an_output_beside_a_source_is_accepted(tmp_path, model, output):
    check_apart(tmp_path / output, [("the model", model), ("the text", tmp_path / "absent")])


def test_another_name_of_a_file_that_is_read_is_the_file(tmp_path):
    (tmp_path / "text").write_text("x")
    os.link(tmp_path / "text", tmp_path / "same")
    with pytest.raises(OutputError, match="is the text"):
        check_apart(tmp_path / "same", [("the text", tmp_path / "text")])


def write(folder):
    with new_folder(folder) as partial:
        (partial / "config.json").write_text("{}")
        (partial / "base").mkdir()
        (partial / "base" / "model.safetensors").write_bytes(b"weights")
    return folder


def replace(folder):
    with new_folder(folder, overwrite=True) as partial:
        (partial / "config.json").write_text("new")


def test_what_was_written_may_be_replaced(tmp_path):
    replace(write(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").read_text() == "new"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", MANIFEST_FILE}


def change(path, data):
    def act(folder):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)

    return act


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (change("notes.txt", b"mine"), "notes.txt"),
        (change("base/runs/log", b"mine"), "base/runs/log"),
        (change("base/model.safetensors", b"trained"), "base/model.safetensors"),
        (change("base/model.safetensors", b"WEIGHTS"), "base/model.safetensors"),
        (lambda folder: (folder / "empty").mkdir(), "empty"),
        (lambda folder: (folder / "away").symlink_to(folder.parent), "away"),
        (change(MANIFEST_FILE, b"{}"), MANIFEST_FILE),
        (lambda folder: (folder / MANIFEST_FILE).unlink(), MANIFEST_FILE),
    ],
)
def test_a_folder_with_anything_else_is_kept_and_it_is_named(tmp_path, spoil, named):
    folder = write(tmp_path / "out")
    spoil(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    with pytest.raises(SpectrimError) as refusal:
        replace(folder)
    assert named in str(refusal.value)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


OLDER = {
    "result": [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "recipe.yaml",
        "README.md",
        "spectrim_report.json",
    ],
    "elastic": [
        "elastic.json",
        "elastic.safetensors",
        "base/config.json",
        "base/model.safetensors",
        "recipe.yaml",
        "README.md",
        "spectrim_report.json",
    ],
    "survey": ["survey.json", "curves.safetensors", "factors.safetensors"],
}


@pytest.mark.parametrize("kind", OLDER)
@pytest.mark.parametrize("foreign", [None, "thesis.tex", "data/model.safetensors", "a.safetensors"])
def test_folders_of_earlier_versions_are_known_by_their_names(tmp_path, kind, foreign):
    for name in [*OLDER[kind], *([foreign] if foreign else [])]:
        change(name, b"{}")(tmp_path / "out")
    if foreign is None:
        check_ours(tmp_path / "out")
    else:
        with pytest.raises(OutputError, match=foreign):
            check_ours(tmp_path / "out")


def test_an_ordinary_model_is_not_spectrims(tmp_path):
    for name in ("config.json", "model.safetensors", "README.md"):
        change(name, b"{}")(tmp_path / "model")
    with pytest.raises(OutputError, match="did not write it"):
        replace(tmp_path / "model")
