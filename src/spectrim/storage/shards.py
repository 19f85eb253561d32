"""A checkpoint in shards as one place to read tensors from."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from spectrim.errors import ArtifactError
from spectrim.storage.tensor_file import TensorFile
from spectrim.storage.weight_files import checkpoint_files


class Shards:
    """All tensors of a checkpoint folder; headers are read and checked once, data when asked for.

    Attributes:
        folder: the checkpoint.

    Raises:
        ArtifactError: no safetensors there, a shard is missing or truncated, or a name is in two.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._home: dict[str, TensorFile] = {}
        for path in checkpoint_files(self.folder):
            file = TensorFile(path)
            for name in file.entries:
                if name in self._home:
                    first = self._home[name].path.name
                    raise ArtifactError(f"{self.folder}: {name!r} is in {first} and in {path.name}")
                self._home[name] = file

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors, as stored."""
        return self._home.keys()

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(file.entries[name].bytes for name, file in self._home.items())

    def outline(self, name: str) -> Tensor:
        """Shape and dtype of one tensor, on the meta device."""
        return self._home[name].outline(name)

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in memory of its own.

        Raises:
            ArtifactError: it is not there, or its file cannot be read.
        """
        if name not in self._home:
            raise ArtifactError(f"{self.folder} holds no tensor {name!r}")
        return self._home[name].read(name)
