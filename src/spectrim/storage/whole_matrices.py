"""A result whose targets are whole matrices, as exports of codes read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from spectrim.errors import ArtifactError, InputError
from spectrim.formats import format_of
from spectrim.formats.number_format import Coded
from spectrim.storage.inspect import FolderInspection, StoredTarget, inspect_folder
from spectrim.storage.tensor_file import TensorFile


def coded(target: StoredTarget) -> Coded:
    """The format of a rounded target."""
    row = format_of(target.weights)
    assert isinstance(row, Coded)
    return row


@dataclass(frozen=True)
class WholeMatrices:
    """The tensors of such a folder, read when they are asked for.

    Attributes:
        found: what its headers say.
    """

    found: FolderInspection
    _files: dict[Path, TensorFile] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, holder: str) -> WholeMatrices:
        """Look at a folder for an export.

        Args:
            folder: a result of spectrim.
            holder: what it becomes, for messages.

        Raises:
            ArtifactError: the folder is damaged or holds no compressed model.
            InputError: a target was cut; names it.
        """
        found = inspect_folder(folder)
        if found.table is None:
            raise ArtifactError(f"{folder} holds no model compressed by spectrim")
        for target in found.targets:
            if target.storage != "dense":
                raise InputError(
                    f"{target.name} is stored {target.storage} at rank {target.rank}, and "
                    f"{holder} holds whole matrices only; compress with --weights auto "
                    "--storage dense, or export it --dense"
                )
        return cls(found)

    @property
    def rounded(self) -> list[StoredTarget]:
        """Targets in codes."""
        return [target for target in self.found.targets if target.weights != "native"]

    def read(self, name: str) -> Tensor:
        """A tensor by its name on disk."""
        path = self.found.path / self.found.tensors[name].file
        return self._files.setdefault(path, TensorFile(path)).read(name)

    def tensors_of(self, target: StoredTarget) -> Mapping[str, str]:
        """The tensors of a rounded target's format -> their names on disk."""
        row = format_of(target.weights)
        names = row.tensors(target.out_features, target.in_features)
        stored = {key: f"{target.name}.inner.{key}" for key in names}
        return stored | {row.main: f"{target.name}.weight"}

    def codes(self, target: StoredTarget) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes (out, in) of a rounded target, and its scales (out, groups), one if per row."""
        stored = {key: self.read(name) for key, name in self.tensors_of(target).items()}
        codes = coded(target).unpack(stored.pop("codes"), target.in_features)
        return codes, {key: t if t.ndim == 2 else t[:, None] for key, t in stored.items()}
