"""A plan file: ranks that `spectrim plan` wrote and that a person may have edited. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Protocol

from pydantic import Field, StringConstraints

from spectrim.allocate.plan import Plan, PlanEntry, Storage, Weights
from spectrim.errors import ArtifactError
from spectrim.layers.layout import layout_of
from spectrim.storage.json_file import check_unique, read_json
from spectrim.storage.strict import (
    MOST_TARGETS,
    Finite,
    Name,
    Side,
    Strict,
    Text,
    check_version,
    checked,
)

FORMAT_VERSION = 1

_Path = Annotated[str, StringConstraints(max_length=4096)]
Bytes = Annotated[int, Field(ge=1, lt=2**63)]


class _Entry(Strict):
    name: Name
    rank: Side | None
    storage: Storage
    bytes: Bytes
    dense_bytes: Bytes
    weights: Weights = "native"
    loss: Finite | None = None


class _Record(Strict):
    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    entries: Annotated[tuple[_Entry, ...], Field(min_length=1, max_length=MOST_TARGETS)]
    keep: Annotated[float, Field(gt=0, le=1)]
    rule: Text
    notes: Annotated[tuple[Text, ...], Field(max_length=10_000)] = ()
    unit: Text | None = None
    survey: _Path | None = None
    model: _Path | None = None
    identity: Text | None = None


def load_plan(path: str | Path) -> tuple[Plan, str | None]:
    """A plan, and the folder of the survey that it says it was made from.

    Raises:
        ArtifactError: the file is not a plan, or contradicts itself; names what.
    """
    record = _load(path)
    entries = tuple(PlanEntry(**dict(entry)) for entry in record.entries)
    return Plan(entries, record.keep, record.rule, record.notes, record.unit), record.survey


class _Identified(Protocol):
    """A loaded model."""

    name: str

    def identity(self) -> str:
        """SHA-256 of what it is."""
        ...


def check_model(path: str | Path, loaded: _Identified) -> None:
    """Refuse a plan file that was made for another model than the one at hand.

    Args:
        path: the file; one of an earlier version does not say whose it is.
        loaded: the model.

    Raises:
        ArtifactError: names both models.
    """
    record = _load(path)
    if record.identity is not None and record.identity != (found := loaded.identity()):
        raise ArtifactError(
            f"the plan {path} was made for the model {record.model} (identity "
            f"{record.identity[:12]}), not for {loaded.name} (identity {found[:12]})"
        )


def _load(path: str | Path) -> _Record:
    try:
        data = read_json(path)
    except ArtifactError as error:
        raise ArtifactError(f"{path} is no plan written by `spectrim plan`: {error}") from error
    source = f"{path}, which is not a plan written by `spectrim plan`:"
    check_version(data, FORMAT_VERSION, absent=1, source=source)
    record = checked(_Record, data, source=source)
    check_unique((entry.name for entry in record.entries), path)
    for entry in record.entries:
        try:
            layout = layout_of(entry.storage, entry.weights)
        except ArtifactError as error:
            raise ArtifactError(f"{path}: {entry.name}: {error}") from error
        if (entry.rank is not None) != layout.low_rank:
            raise ArtifactError(
                f"{path}: {entry.name} has rank {entry.rank}, which does not go with its storage "
                f"{entry.storage!r}"
            )
        if layout.low_rank and not layout.told_apart:
            raise ArtifactError(
                f"{path}: {entry.name} is stored {entry.storage} with weights {entry.weights!r}, "
                "whose matrix is not rounded; name formats such as int3-g128+int8"
            )
    return record
