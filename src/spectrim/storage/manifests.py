"""What lies in a folder, file by file: of unfinished work, and of a finished result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spectrim import __version__
from spectrim.errors import ArtifactError
from spectrim.storage.json_file import read_json
from spectrim.storage.strict import Strict

FORMAT_VERSION = 1


class FileRecord(Strict):
    """A finished file."""

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    bytes: Annotated[int, Field(ge=0)]


class WorkManifest(BaseModel):
    """Whose work it is, and what is finished."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = FORMAT_VERSION
    spectrim: str = Field(default=__version__, max_length=64)
    identity: dict[str, Any] = Field(default_factory=dict, max_length=4096)
    files: dict[str, FileRecord] = Field(default_factory=dict, max_length=1_000_000)


def read_work_manifest(path: Path) -> WorkManifest:
    """The manifest of unfinished work.

    Raises:
        ArtifactError: damaged, or of another version.
    """
    try:
        found = WorkManifest.model_validate(read_json(path))
    except ValidationError as error:
        raise ArtifactError(
            f"{path} is no manifest of a work folder ({error.error_count()} problems, first: "
            f"{error.errors()[0]['loc']}); remove the folder to start anew"
        ) from error
    if found.format_version != FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format version {found.format_version}, this version of spectrim writes "
            f"{FORMAT_VERSION}; finish the run with the version that began it ({found.spectrim})"
        )
    return found
