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
from typing import Any, Literal

from spectrim.data.chat import SHAPES, is_chat, render_chat
from spectrim.data.corpora import CORPORA, load_corpus
from spectrim.errors import TextError

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
    def from_documents(
        cls, documents: Sequence[str], *, name: str, separator: str = DOCUMENT_SEPARATOR
    ) -> Text:
        """Join documents; raises `TextError` when nothing but white space remains."""
        content = separator.join(documents)
        if not content.strip():
            raise TextError(
                f"the text {name!r} is empty: {len(documents)} documents hold {len(content)} "
                "characters, none of them visible; give a source with text in it"
            )
        return cls(content, name, hashlib.sha256(content.encode()).hexdigest())


def split_sources(text: str | Path) -> list[tuple[str, float]]:
    """Names and shares of `a.txt:0.7,b.jsonl:0.3`; a source without a share has 1.

    Raises:
        TextError: a share that is not positive, or only some of several sources have one.
    """
    found: list[tuple[str, float]] = []
    told = 0
    for part in (part.strip() for part in str(text).split(",")):
        name, colon, tail = part.rpartition(":")
        try:
            share = float(tail) if colon else None
        except ValueError:
            share = None  # the colon belongs to the name
        if share is None:
            found.append((part, 1.0))
            continue
        if not 0 < share < float("inf"):
            raise TextError(f"the share of {name!r} is {tail}; give a positive number")
        told += 1
        found.append((name, share))
    if 0 < told < len(found):
        raise TextError(
            f"{told} of the {len(found)} texts in {str(text)!r} have a share; give all of them "
            "one, as in a.txt:0.7,b.jsonl:0.3, or none"
        )
    return found


def read_text(
    source: str | Path | Sequence[str] | Text,
    *,
    split: Split = "calibration",
    tokenizer: Any = None,
) -> Text:
    """Read a text from a file, a list of documents, or a corpus name.

    Args:
        source: a `.txt` or `.jsonl` file, plain or gzipped, whose rows have a field `text` or are
            conversations (`data.chat`); a list of documents; one of the names `wikitext2`, `c4`,
            `ptb`, which need the extra `text` and a network or a filled cache; a `Text` is
            returned as it is.
        split: which part of a named corpus: `calibration` is its training text, `evaluation`
            its test text (for c4, which has none, its validation text).
        tokenizer: its chat template writes conversations; only they need it.

    Returns:
        The text with its name and hash.

    Raises:
        TextError: the source is unknown, unreadable, empty, or needs the model (`self`).
        MissingExtraError: a named corpus without the package `datasets`.
    """
    if isinstance(source, Text):
        return source
    if isinstance(source, str | Path):
        return _read_named(source, split, tokenizer)
    documents = list(source)
    strangers = [type(d).__name__ for d in documents if not isinstance(d, str)]
    if strangers:
        raise TextError(
            f"a list of documents must hold strings only; {len(strangers)} of {len(documents)} "
            f"entries are not, the first is a {strangers[0]}"
        )
    return Text.from_documents(documents, name="list")


def find_file(source: str | Path) -> Path | None:
    """The file that a source names; None for corpora and `self`.

    Raises:
        TextError: there is no such file, or it ends in something else than texts do.
    """
    if source in (*CORPORA, SELF):
        return None
    path = Path(source)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "is neither an existing file nor a known name"
        raise TextError(
            f"the text source {str(source)!r} {found}; known names: {', '.join((*CORPORA, SELF))}; "
            "files: .txt, .jsonl, either also as .gz"
        )
    if _kind(path) not in (".txt", ".jsonl"):
        raise TextError(
            f"the file {path} ends in {path.suffix!r}; expected .txt or .jsonl, either also as .gz"
        )
    return path


def _kind(path: Path) -> str:
    """The last suffix, in lower case; that below .gz, which says nothing of what is inside."""
    inner = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return inner.suffix.lower()


def _read_named(source: str | Path, split: Split, tokenizer: Any) -> Text:
    path = find_file(source)
    if path is not None:
        return _read_file(path, tokenizer)
    if source == SELF:
        raise TextError(
            "the source 'self' is sampled from a model and cannot be read as a text here; "
            "use spectrim.data.sample_windows(model, ...), or name a file"
        )
    return Text.from_documents(load_corpus(str(source), split), name=str(source))


def _read_file(path: Path, tokenizer: Any) -> Text:
    try:
        zipped = path.suffix.lower() == ".gz"
        content = gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()
        decoded = content.decode("utf-8")
    except (OSError, EOFError) as error:
        raise TextError(f"the file {path} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise TextError(
            f"the file {path} is not UTF-8: {error.reason} at byte {error.start}; convert it first"
        ) from error
    if _kind(path) == ".txt":
        return Text.from_documents([decoded], name=path.name)
    return _json_lines(decoded, path, tokenizer)


def _json_lines(content: str, path: Path, tokenizer: Any) -> Text:
    documents = []
    chats = 0
    # Only "\n" ends a JSON line: splitlines() would also cut at U+2028 inside a string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise TextError(f"{where} is not JSON: {error.msg}") from error
        if isinstance(entry, dict) and is_chat(entry):
            chats += 1
            documents.append(render_chat(entry, tokenizer, where=where))
        elif isinstance(entry, dict) and isinstance(entry.get("text"), str):
            documents.append(entry["text"])
        else:
            found = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
            raise TextError(f"{where}: expected a string field {SHAPES}; found {found}")
    if chats == 0:
        return Text.from_documents(documents, name=path.name)
    if chats < len(documents):
        raise TextError(
            f"{path} mixes {chats} conversations with {len(documents) - chats} rows of plain "
            "text; put them into two files"
        )
    name = f"{path.name} (chat template)"
    return Text.from_documents(documents, name=name, separator="")
