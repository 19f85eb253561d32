"""Texts are read as they are, and whatever cannot be read is named."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from spectrim.data.corpora import CORPORA, load_corpus
from spectrim.data.text import Text, read_text, split_sources
from spectrim.errors import MissingExtraError, TextError


def test_a_text_file_is_read_unchanged(tmp_path):
    content = "One.\r\nTwo — café.\n"
    path = tmp_path / "a.txt"
    path.write_bytes(content.encode())
    text = read_text(path)
    assert text.content == content
    assert text.name == "a.txt"
    assert text.sha256 == hashlib.sha256(content.encode()).hexdigest()
    assert read_text(str(path)) == text
    assert read_text(text) is text


def test_gzip_holds_the_same_text(tmp_path):
    plain, zipped = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_text("some words")
    zipped.write_bytes(gzip.compress(b"some words"))
    assert read_text(zipped).sha256 == read_text(plain).sha256


def test_json_lines_are_documents(tmp_path):
    path = tmp_path / "a.jsonl"
    # U+2028 is a line separator to Python, but not to JSON lines.
    entries = [{"text": "first\u2028line", "id": 1}, {"text": "second"}]
    lines = "\n\n".join(json.dumps(e, ensure_ascii=False) for e in entries)
    path.write_text(lines, encoding="utf-8")
    assert read_text(path).content == "first\u2028line\n\nsecond"
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert read_text(zipped).content == read_text(path).content


def test_sources_may_have_shares():
    assert split_sources("a.txt") == [("a.txt", 1.0)]
    assert split_sources("a.txt:0.7, b.jsonl:0.3") == [("a.txt", 0.7), ("b.jsonl", 0.3)]
    assert split_sources("c4,self") == [("c4", 1.0), ("self", 1.0)]
    assert split_sources("C:/texts/a.txt") == [("C:/texts/a.txt", 1.0)]
    with pytest.raises(TextError, match="1 of the 2 texts"):
        split_sources("a.txt:0.7,b.jsonl")
    for share in ("0", "-1", "nan", "inf"):
        with pytest.raises(TextError, match="positive"):
            split_sources(f"a.txt:{share}")


def test_a_list_is_joined_by_blank_lines():
    assert read_text(["a", "b"]).content == "a\n\nb"
    assert read_text(["a", "b"]).name == "list"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n ", "empty"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
        ("a.csv", b"x", r"'\.csv'.*\.txt or \.jsonl"),
        ("a.jsonl", b"{oops", "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', r"line 2.*'text'.*\['body'\]"),
        ("a.jsonl", b'["text"]', "found list"),
        ("a.jsonl", b"", "0 documents"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_text(path)


def test_a_truncated_gzip_file_is_named(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"some words" * 1000)[:-12])
    with pytest.raises(TextError, match=r"a\.txt\.gz cannot be read"):
        read_text(path)


def test_unknown_sources_list_the_names(tmp_path):
    with pytest.raises(TextError, match=r"'wikitext3'.*wikitext2, c4, ptb, self"):
        read_text("wikitext3")
    with pytest.raises(TextError, match="is a folder"):
        read_text(tmp_path)
    with pytest.raises(TextError, match="'self' is sampled from a model"):
        read_text("self")
    with pytest.raises(TextError, match=r"1 of 2.*int"):
        read_text(["a", 3])  # type: ignore[list-item]
    with pytest.raises(TextError, match="empty"):
        read_text([])


class StandInError(Exception):
    """Plays the package's own root error."""


def stand_in(monkeypatch, load):
    """Put a module with `load` in the place of the package."""
    exceptions = SimpleNamespace(DatasetsError=StandInError)
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    monkeypatch.setitem(sys.modules, "datasets.exceptions", exceptions)


@pytest.mark.parametrize("name", sorted(CORPORA))
def test_corpora_are_loaded_by_pinned_revision_and_part(monkeypatch, name):
    calls = []
    corpus = CORPORA[name]

    def load(repository, configuration, **options):
        calls.append((repository, configuration, options))
        return ({corpus.field: f"document {i}"} for i in range(3000))

    stand_in(monkeypatch, load)
    documents = {part: load_corpus(name, part) for part in ("calibration", "evaluation")}
    assert [c[2]["split"] for c in calls] == list(corpus.splits.values())
    assert all(c[2]["revision"] == corpus.revision for c in calls)
    assert documents["evaluation"][:2] == ["document 0", "document 1"]
    assert len(documents["evaluation"]) == (2000 if name == "c4" else 3000)
    assert read_text(name, split="evaluation").name == name


@pytest.mark.parametrize("error", [ConnectionError("no route"), StandInError("gone")])
def test_an_unreachable_corpus_says_how_to_give_it_locally(monkeypatch, error):
    def load(*_, **__):
        raise error

    stand_in(monkeypatch, load)
    with pytest.raises(TextError, match=r"Salesforce/wikitext.*local \.txt or \.jsonl"):
        read_text("wikitext2")


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"spectrim\[text\]"):
        read_text("c4")


def test_a_known_name_wins_over_a_file(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("ptb").write_text("a local file without suffix")
    stand_in(monkeypatch, lambda *_, **__: [{"sentence": "s"}])
    assert read_text("ptb") == Text.from_documents(["s"], name="ptb")
