"""Data that a stranger wrote becomes a record of known fields, or one error that says why not.

Names become keys of dictionaries and patterns, never paths: a `Name` has no separator but the dot.
Numbers and lengths are bounded, so that no file can ask for more memory or time than its own size
accounts for. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from spectrim.errors import ArtifactError

DEEPEST = 64
"""Nesting of lists and objects that is read; no file of ours needs more than ten."""

MOST_TARGETS = 200_000
"""Targets of one model; the largest mixtures of experts have fewer linear layers."""

LARGEST_SIDE = 2**24
"""Of a matrix; ten times the largest vocabulary."""

Name = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z0-9_\-]+(\.[A-Za-z0-9_\-]+)*$", max_length=400)
]
Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
Text = Annotated[str, StringConstraints(max_length=1000)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

Record = TypeVar("Record", bound=BaseModel)


class Strict(BaseModel):
    """A record that refuses unknown keys and does not change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def checked(record: type[Record], data: Any, *, source: str | Path) -> Record:
    """Validate plain data.

    Raises:
        ArtifactError: names the source, the field, and what it may be.
    """
    try:
        return record.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"]) or "top level"
        raise ArtifactError(
            f"{source} is damaged or not written by spectrim: {where}: {first['msg']} "
            f"({error.error_count()} problem(s))"
        ) from error


def check_version(
    data: Mapping[str, Any], newest: int, *, source: str | Path, absent: int | None = None
) -> None:
    """Refuse a file of a newer format, and one that does not state a format.

    Args:
        data: the whole file.
        newest: the version that is written now.
        source: for the message.
        absent: version of files that state none; None refuses them.

    Raises:
        ArtifactError: names the version that is needed.
    """
    version = data.get("format_version", absent)
    if type(version) is not int or version < 1:
        raise ArtifactError(
            f"{source} has format_version {str(version)[:40]}, expected a number from 1 to "
            f"{newest}: it is damaged or not written by spectrim"
        )
    if version > newest:
        raise ArtifactError(
            f"{source} has format_version {version}, this spectrim reads up to {newest}; "
            f"install a spectrim that reads format_version {version} "
            "(pip install --upgrade spectrim)"
        )


def check_nesting(data: Any, *, source: str | Path) -> None:
    """Refuse what is nested so deeply that going through it could exhaust the stack.

    Raises:
        ArtifactError: deeper than `DEEPEST`.
    """
    waiting = [(data, 1)]
    while waiting:
        part, depth = waiting.pop()
        inner = part.values() if isinstance(part, Mapping) else part
        deeper = [value for value in inner if isinstance(value, Mapping | list | tuple)]
        if deeper and depth >= DEEPEST:
            raise ArtifactError(f"{source} is nested more than {DEEPEST} levels deep")
        waiting += [(value, depth + 1) for value in deeper]
