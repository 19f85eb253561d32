"""What a result owes to the model it was made from: license, languages, and the license's text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectrim.errors import RecipeError
from spectrim.plain_yaml import parse_plain, read_bounded

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[A-Za-z0-9][\w.\-]*")

CARRIED = ("license", "license_name", "license_link", "language")
"""Fields of a card's front matter that hold for the result as well."""

LICENSES = re.compile(r"(licen[cs]e|notice|copying|use_policy)[\w.\-]*", re.IGNORECASE)
LARGEST_LICENSE = 2**20
"""Bytes; what is larger is no license."""


@dataclass(frozen=True)
class Origin:
    """What is carried over.

    Attributes:
        hub_id: of the original on the Hub; None for a folder that does not say.
        matter: front matter of its card, the `CARRIED` fields only.
        files: its license and notice files.
    """

    hub_id: str | None = None
    matter: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[Path, ...] = ()


def read_origin(base: str | Path) -> Origin:
    """Read a folder, or the files of a Hub name as far as the hub or its cache has them.

    A card without readable front matter carries nothing over; the result's card then says so.
    """
    folder = Path(base)
    if folder.is_file():
        return _read(folder.parent, None)
    if not folder.is_dir():
        if not HUB_ID.fullmatch(str(base)):
            return Origin()
        hub_id = str(base)
        found = _snapshot(hub_id)
        return Origin(hub_id) if found is None else _read(found, hub_id)
    return _read(folder, None)


def _read(folder: Path, hub_id: str | None) -> Origin:
    card = folder / "README.md"
    matter: dict[str, Any] = {}
    if card.is_file():
        try:
            parts = re.split(r"^---\s*$", read_bounded(card), maxsplit=2, flags=re.MULTILINE)
            if len(parts) == 3 and not parts[0].strip():
                matter = parse_plain(parts[1], source=str(card))
        except RecipeError:
            matter = {}  # a card that is none says nothing about the license
    files = tuple(
        path
        for path in sorted(folder.iterdir())
        if LICENSES.fullmatch(path.name)
        and path.is_file()
        and path.stat().st_size <= LARGEST_LICENSE
    )
    return Origin(hub_id, {k: matter[k] for k in CARRIED if _plain(matter.get(k))}, files)


def _plain(value: Any) -> bool:
    """Whether a value is a word or a list of words; nothing else is carried over."""
    if isinstance(value, list):
        return bool(value) and all(isinstance(v, str) for v in value)
    return isinstance(value, str) and bool(value)


def _snapshot(hub_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    patterns = ["README.md", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except (OSError, ValueError, HfHubHTTPError):
        return None  # no network and nothing in the cache
