"""Text sources: files, lists of strings, and three public corpora by name.

Whatever the source, the result is one string and its SHA-256: documents are joined by one blank
line, as the harness of SVD-LLM (arXiv 2403.07378) joins them, so that perplexities stay comparable
with the literature's tables.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spectrim.data.corpora import CORPORA, load_corpus
from spectrim.errors import TextError

__all__ = ["DOCUMENT_SEPARATOR", "SELF", "Split", "Text", "read_text"]

DOCUMENT_SEPARATOR = "\n\n"
SELF = "self"
"""The source name that stands for windows sampled from the model; see `data.self_text`."""

Split = Literal["calibration", "evaluation"]


@dataclass(frozen=True)
class Text:
    """One text and where it came from.

    Attributes:
        content: the documents, joined by a blank line.
        name: the corpus name, the file name, or `list` for strings given directly.
        sha256: hex digest of `content` in UTF-8.
    """

    content: str
    name: str
    sha256: str

    @classmethod
    def from_documents(cls, documents: Sequence[str], *, name: str) -> Text:
        """Join documents; raises `TextError` when nothing but white space remains."""
        content = DOCUMENT_SEPARATOR.join(documents)
        if not content.strip():
            raise TextError(
                f"the text {name!r} is empty: {len(documents)} documents hold {len(content)} "
                "characters, none of them visible; give a source with text in it"
            )
        return cls(content, name, hashlib.sha256(content.encode()).hexdigest())


def read_text(source: str | Path | Sequence[str] | Text, *, split: Split = "calibration") -> Text:
    """Read a text from a file, a list of documents, or a corpus name.

    Args:
        source: a `.txt` or `.jsonl` file (field `text`), plain or gzipped; a list of documents;
            one of the names `wikitext2`, `c4`, `ptb`, which need the extra `text` and a network
            or a filled cache; a `Text` is returned as it is.
        split: which part of a named corpus: `calibration` is its training text, `evaluation`
            its test text (for c4, which has none, its validation text).

    Returns:
        The text with its name and hash.

    Raises:
        TextError: the source is unknown, unreadable, empty, or needs the model (`self`).
        MissingExtraError: a named corpus without the package `datasets`.
    """
    if isinstance(source, Text):
        return source
    if isinstance(source, str | Path):
        return _read_named(source, split)
    documents = list(source)
    strangers = [type(d).__name__ for d in documents if not isinstance(d, str)]
    if strangers:
        raise TextError(
            f"a list of documents must hold strings only; {len(strangers)} of {len(documents)} "
            f"entries are not, the first is a {strangers[0]}"
        )
    return Text.from_documents(documents, name="list")


def _read_named(source: str | Path, split: Split) -> Text:
    if isinstance(source, str) and source in CORPORA:
        return Text.from_documents(load_corpus(source, split), name=source)
    if source == SELF:
        raise TextError(
            "the source 'self' is sampled from a model and cannot be read as a text here; "
            "use spectrim.data.sample_windows(model, ...), or name a file"
        )
    path = Path(source)
    if path.is_file():
        return Text.from_documents(_read_documents(path), name=path.name)
    found = "is a folder" if path.is_dir() else "is neither an existing file nor a known name"
    raise TextError(
        f"the text source {str(source)!r} {found}; known names: {', '.join((*CORPORA, SELF))}; "
        "files: .txt, .jsonl with a field 'text', either also as .gz"
    )


def _read_documents(path: Path) -> list[str]:
    suffixes = [s.lower() for s in path.suffixes]
    zipped = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if zipped else suffixes)[-1:]
    if kind not in ([".txt"], [".jsonl"]):
        raise TextError(
            f"the file {path} ends in {path.suffix!r}; expected .txt or .jsonl, either also as .gz"
        )
    try:
        content = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
        decoded = content.decode("utf-8")
    except (OSError, EOFError) as error:
        raise TextError(f"the file {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"the file {path} is not UTF-8: {error.reason} at byte {error.start}; convert it first"
        ) from error
    return _json_lines(decoded, path) if kind == [".jsonl"] else [decoded]


def _json_lines(content: str, path: Path) -> list[str]:
    documents = []
    # Only "\n" ends a JSON line: splitlines() would also cut at U+2028 inside a string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise TextError(f"{path}, line {number} is not JSON: {error.msg}") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("text"), str):
            found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise TextError(
                f"{path}, line {number}: expected an object with a string field 'text', "
                f"found {found}"
            )
        documents.append(entry["text"])
    return documents
