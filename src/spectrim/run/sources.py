"""What a command reads, and where it lies: places that it must not write to. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from spectrim.errors import ArtifactError
from spectrim.storage.json_file import read_json
from spectrim.storage.ownership import Source

_HUB_NAME = re.compile(r"[\w.\-]+(/[\w.\-]+)?")
_SHARE = re.compile(r":[\d.]+$")
"""Of the windows, after a text's name."""

_NAMES_ITS_MODEL = {"survey.json": ("model_name",), "elastic.json": ("base", "name")}


def sources_of(
    *,
    model: Any = (),
    survey: Any = (),
    artifact: Any = (),
    result: Any = (),
    curve: Any = (),
    plan: Any = (),
    text: Any = (),
) -> list[Source]:
    """Every file and folder that was named, with those which they name themselves.

    Args:
        model: hub names, folders, or model objects, which remember where they were loaded from.
        survey: folders or surveys in memory; each names its model.
        artifact: elastic artifacts or surveys; each names its base model.
        result: folders of compressed models.
        curve: what `spectrim curve` wrote.
        plan: files or plans in memory; a file may name its survey.
        text: source names and files, several separated by commas; anything else lies nowhere.

    Returns:
        What each is, for messages, and its place; only places that exist.
    """
    named: dict[str, Any] = {
        "the model": model,
        "the survey": survey,
        "the elastic artifact": artifact,
        "the result": result,
        "the curve": curve,
        "the plan": plan,
    }
    found = [(what, place) for what, values in named.items() for place in _places(_several(values))]
    for value in _several(text):
        if isinstance(value, str | Path):
            parts = (Path(_SHARE.sub("", part.strip())) for part in str(value).split(","))
            found += [("the text", part) for part in parts if _exists(part)]
    for what, place in list(found):
        found += _named_by(what, place)
    return found


def _several(values: Any) -> Iterable[Any]:
    return values if isinstance(values, list | tuple) else (values,)


def _places(values: Iterable[Any]) -> Iterator[Path]:
    """Where things lie that are named, or remember it; None and what lies nowhere gives none."""
    for value in values:
        name = value
        if not isinstance(value, str | Path):
            remembered = getattr(getattr(value, "config", None), "name_or_path", None)
            name = getattr(value, "folder", None) or remembered
        if not name:
            continue
        if _exists(Path(name)):
            yield Path(name)
        elif (cached := _in_cache(str(name))) is not None:
            yield cached


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False  # too long for a path, or no path at all


def _in_cache(name: str) -> Path | None:
    """The folder of a hub model that was downloaded earlier."""
    if not _HUB_NAME.fullmatch(name):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _named_by(what: str, place: Path) -> Iterator[Source]:
    """The survey of a plan, and the models of surveys and artifacts, its survey's included."""
    try:
        if what == "the plan":
            survey = read_json(place).get("survey")
            if isinstance(survey, str) and _exists(Path(survey)):
                yield "the survey of the plan", Path(survey)
                yield from _named_by("the survey", Path(survey))
            return
        for file, keys in _NAMES_ITS_MODEL.items():
            if not (place / file).is_file():
                continue
            name: Any = read_json(place / file)
            for key in keys:
                name = name.get(key) if isinstance(name, dict) else None
            if isinstance(name, str):
                yield from ((f"the model of {what}", inner) for inner in _places([name]))
    except ArtifactError:
        return  # whoever reads it for its contents says what is wrong with it
