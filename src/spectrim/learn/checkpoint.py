"""One file from which a training goes on as if it had never stopped: tensors, counters, identity.

The file is safetensors with a JSON text in its header, written beside the old one, forced to disk
and renamed, so that a kill at any moment leaves a complete checkpoint. Nothing random has to be
stored: whatever is drawn in a training depends on the seed and the step alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spectrim.errors import ArtifactError, InputError, OutputError
from spectrim.storage.headers import read_header
from spectrim.storage.strict import check_nesting, checked
from spectrim.storage.tensor_file import Slot, write_tensors
from spectrim.storage.work import CHECKPOINTS

FILE, RECOVERY_FILE = CHECKPOINTS
"""The checkpoint of a training, and that of its recovery beside the one of the phases before."""

_KEY = "state"


class _State(BaseModel):
    """What the header says; everything besides the identity belongs to the training."""

    model_config = ConfigDict(frozen=True, extra="allow")

    identity: dict[str, Any]


class _Parts(dict[str, Any]):
    """Tensors or counters of a checkpoint; asking for one that is absent is a clear error."""

    def __missing__(self, name: str) -> Any:
        raise ArtifactError(
            f"the checkpoint of the training lacks {name!r}; remove it to start anew"
        )


@dataclass
class Checkpoint:
    """Where a training keeps itself.

    Attributes:
        folder: the work folder; created when something is saved.
        identity: flat plain data that a resumed run must share, e.g. every field of its recipe.
        every: steps between two saves.
        file: its name in the folder.
    """

    folder: Path
    identity: dict[str, Any]
    every: int
    file: str = FILE

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.file

    def due(self, step: int) -> bool:
        """Whether to save after this step (1-based)."""
        return step % self.every == 0

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the checkpoint; state is plain data.

        Raises:
            OutputError: the disk is full or the folder cannot be written.
        """
        text = json.dumps({"identity": self.identity, **state})
        slots = [Slot.of(name, tensor) for name, tensor in tensors.items()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_tensors(self.path, slots, {_KEY: text})
        except OSError as error:
            raise OutputError(
                f"{self.path} could not be written: {error.strerror or error}; the checkpoint "
                "before it is kept: make room and run again"
            ) from error

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and state, None if there is no checkpoint.

        Raises:
            ArtifactError: the file is damaged.
            InputError: it belongs to another run; the message names the differences.
        """
        if not self.path.exists():
            return None
        try:
            names = read_header(self.path)
            with safe_open(str(self.path), framework="pt") as file:
                state = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in names}
            check_nesting(state if isinstance(state, dict) else {}, source=self.path)
            state = checked(_State, state, source=self.path).model_dump()
        except (ArtifactError, SafetensorError, KeyError, ValueError, OSError) as error:
            raise ArtifactError(
                f"{self.path} is no checkpoint of a training ({error}); remove it to start anew"
            ) from error
        except RecursionError as error:
            raise ArtifactError(
                f"{self.path} is no checkpoint of a training (nested too deeply); remove it to "
                "start anew"
            ) from error
        self._compare(state.pop("identity"))
        return _Parts(tensors), _Parts(state)

    def _compare(self, found: dict[str, Any]) -> None:
        here = json.loads(json.dumps(self.identity))
        names = sorted(k for k in found.keys() | here.keys() if found.get(k) != here.get(k))
        if names:
            listed = "; ".join(f"{k}: {found.get(k)!r} there, {here.get(k)!r} now" for k in names)
            raise InputError(
                f"{self.path} belongs to another run, {len(names)} setting(s) differ: {listed}. "
                "Resume with the same settings, or remove the folder to start anew"
            )


def where_kept(checkpoint: Checkpoint | None) -> str:
    """A sentence for the end of an error message."""
    if checkpoint is None or not checkpoint.path.exists():
        return "There is no checkpoint to go back to"
    return f"The last checkpoint is kept in {checkpoint.path}"


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """The optimizer's state as named tensors."""
    states = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, entries in states.items()
        for name, value in entries.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str
) -> None:
    """The inverse of `optimizer_tensors`, for an optimizer over the same parameters."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        head, _, rest = name.partition(".")
        if head == prefix:
            index, _, key = rest.partition(".")
            if not index.isdecimal():
                raise ArtifactError(
                    f"the checkpoint of the training holds {name!r}, which is no state of an "
                    "optimizer; remove it to start anew"
                )
            states.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
