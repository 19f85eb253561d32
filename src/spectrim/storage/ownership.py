"""Whose files lie in a folder: what spectrim wrote may be replaced by it, everything else may not.

Every folder that is written whole ends with `spectrim_manifest.json`: each of its files with size
and SHA-256. A folder of an earlier version, which has none, is known by its report or its
`survey.json`, and then only files of the names that such folders have count as spectrim's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from spectrim.errors import OutputError
from spectrim.storage.json_file import read_record
from spectrim.storage.manifests import FileRecord
from spectrim.storage.strict import Strict
from spectrim.storage.whole_file import file_hash

MANIFEST_FILE = "spectrim_manifest.json"
FORMAT_VERSION = 1

Source = tuple[str, Path]
"""Something that a command reads: what it is, for messages, and where it lies."""

_SURVEY_NAMES = {"survey.json", "curves.safetensors", "factors.safetensors"}
_RESULT_NAMES = re.compile(
    r"(base/)?(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens"
    r"|vocab|chat_template|processor_config|preprocessor_config|elastic|spectrim_report"
    r"|model\.safetensors\.index)\.json"
    r"|(base/)?(model(-\d{5}-of-\d{5})?|elastic)\.safetensors"
    r"|(base/)?(merges\.txt|vocab\.txt|tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model)"
    r"|(base/)?(chat_template|additional_chat_templates/[\w.\-]+)\.jinja"
    r"|recipe\.yaml|README\.md"
)


class _Manifest(Strict):
    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    files: Annotated[dict[str, FileRecord], Field(max_length=100_000)]


def seal(folder: Path) -> None:
    """Write down every file of a finished folder.

    Raises:
        OSError: a file cannot be read, or the manifest not written.
    """
    files = {
        name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for name, path in _contents(folder)
    }
    record = {"format_version": FORMAT_VERSION, "files": files}
    (folder / MANIFEST_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def check_ours(folder: Path) -> None:
    """Refuse a folder that holds anything but what spectrim wrote there.

    Raises:
        OutputError: names the first file that is not spectrim's, or was changed since.
        ArtifactError: the manifest is damaged.
    """
    names = {path.name for path in folder.iterdir()}
    listed: dict[str, FileRecord] | None = None
    if MANIFEST_FILE in names:
        listed = read_record(folder / MANIFEST_FILE, _Manifest, FORMAT_VERSION).files
    elif "spectrim_report.json" not in names and "survey.json" not in names:
        raise OutputError(
            f"{folder} holds {len(names)} entries ({min(names)!r}, ...) and no {MANIFEST_FILE}: "
            "spectrim did not write it and does not replace it; choose another folder"
        )
    for name, path in _contents(folder):
        if name == MANIFEST_FILE:
            continue
        reason = _reason(name, path, listed, survey="spectrim_report.json" not in names)
        if reason is not None:
            raise OutputError(
                f"{folder} is not replaced: it holds {name!r}, which {reason}; move it away, or "
                "choose another folder"
            )


def _reason(
    name: str, path: Path, listed: dict[str, FileRecord] | None, *, survey: bool
) -> str | None:
    """Why a file is not spectrim's to remove; None if it is."""
    if path.is_symlink() or not path.is_file():
        return "spectrim did not write"
    if listed is None:
        known = name in _SURVEY_NAMES if survey else _RESULT_NAMES.fullmatch(name) is not None
        return None if known else "spectrim did not write"
    if name not in listed:
        return "spectrim did not write"
    same = path.stat().st_size == listed[name].bytes and file_hash(path) == listed[name].sha256
    return None if same else "was changed after spectrim wrote it"


def _contents(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files, links and empty folders below a folder, by name; links are not followed."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(set(folders) - set(links))
        for name in sorted([*files, *links]):
            yield (here / name).relative_to(folder).as_posix(), here / name
        if here != folder and not (folders or files or links):
            yield here.relative_to(folder).as_posix(), here


def check_apart(output: str | Path, sources: Iterable[Source]) -> None:
    """Refuse to write where something lies that is being read.

    Both are compared as the file system knows them, so that links, `..`, other spellings and
    other mounts of the same folder make no difference.

    Args:
        output: a file or folder that will be written; it need not exist.
        sources: what the command reads; those that do not exist are left out.

    Raises:
        OutputError: the output is, contains or lies inside one of them.
    """
    place = Path(output).resolve()
    own, above = _identity(place), _identities(place.parents)
    for what, path in sources:
        if (found := _identity(path)) is None:
            continue
        parts = _identities([*path.absolute().parents, *path.resolve().parents])
        for target in _link_targets(path):
            parts |= _identities([target, *target.parents])
        if found == own:
            relation = "is"
        elif found in above:
            relation = "lies inside"
        elif own is not None and own in parts:
            relation = "contains"
        else:
            continue
        raise OutputError(
            f"{output} {relation} {what} {path}, which is read: nothing was written; choose "
            "another place for the output"
        )


def _identity(path: Path) -> tuple[int, int] | None:
    """Device and inode; None for what does not exist or cannot be looked at."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _identities(paths: Sequence[Path] | Iterable[Path]) -> set[tuple[int, int]]:
    return {found for path in paths if (found := _identity(path)) is not None}


def _link_targets(path: Path) -> list[Path]:
    """Where the files of a folder really lie: those of the hub's cache are links."""
    if not path.is_dir():
        return []
    return [inner.resolve() for _, inner in _contents(path) if inner.is_symlink()]
