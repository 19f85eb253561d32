"""JSON files: as ours are written, and as a stranger wrote them, bounded and checked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from spectrim.errors import ArtifactError
from spectrim.storage.strict import Record, check_nesting, check_version, checked

JSON_LIMIT = 64 * 2**20
"""Largest JSON file that is read, in bytes."""


def as_json(data: Any, *, indent: int = 2) -> str:
    """Text of a file that other tools read as JSON: no NaN, which is none."""
    return json.dumps(data, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ArtifactError: the file is missing, larger than `JSON_LIMIT`, nested too deeply, holds text
            that is none, or is not a JSON object.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(JSON_LIMIT + 1)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) > JSON_LIMIT:
        raise ArtifactError(f"{path} is larger than the {JSON_LIMIT} bytes that are accepted")
    try:
        data = json.loads(raw.decode("utf-8"))
        if b"\\u" in raw:
            # Half of a surrogate pair can be written as an escape but never as text again.
            json.dumps(data, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ArtifactError(f"{path} holds a {type(data).__name__}, expected a JSON object")
    check_nesting(data, source=path)
    return data


def read_record(
    path: Path, record: type[Record], newest: int, *, absent: int | None = None
) -> Record:
    """A file's record.

    Args:
        path: the file.
        record: what it holds.
        newest: the format version that is written now.
        absent: version of files that state none; None refuses them.

    Raises:
        ArtifactError: no such file, damaged, or of a newer version; names what.
    """
    data = read_json(path)
    check_version(data, newest, source=path, absent=absent)
    return checked(record, data, source=path)


def check_unique(names: Iterable[str], path: str | Path) -> None:
    """Refuse a file that names a target twice.

    Raises:
        ArtifactError: it does.
    """
    listed = list(names)
    if len(set(listed)) != len(listed):
        raise ArtifactError(f"{path}: a target is named twice")
