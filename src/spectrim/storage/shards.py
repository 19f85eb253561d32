"""A checkpoint in shards as one place to read tensors from, and the names a model has for them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from spectrim.errors import ArtifactError, ModelError
from spectrim.storage.inspect import checkpoint_files
from spectrim.storage.tensor_file import TensorFile

__all__ = ["Shards", "names_on_disk"]


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

    def size_of(self, name: str) -> int:
        """Bytes of one tensor."""
        return self._home[name].entries[name].bytes

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in memory of its own.

        Raises:
            ArtifactError: it is not there, or its file cannot be read.
        """
        if name not in self._home:
            raise ArtifactError(f"{self.folder} holds no tensor {name!r}")
        return self._home[name].read(name)


def names_on_disk(model: Any, stored: Collection[str]) -> dict[str, str]:
    """Names of a model's parameters and buffers -> names in its checkpoint.

    Renamings and the presence or absence of the base model's prefix are followed, as transformers
    does. Tensors that are put together from several stored ones have no single name.

    Raises:
        ModelError: the architecture merges or splits stored tensors; names the first.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    known = {*model.state_dict()}
    steps = get_model_conversion_mapping(model)
    prefix = f"{model.base_model_prefix}."
    found: dict[str, str] = {}
    for name in stored:
        renamed = name
        for step in steps:
            if isinstance(step, WeightRenaming):
                renamed, _ = step.rename_source_key(renamed)
            elif step.rename_source_key(renamed)[1] is not None:
                raise ModelError(
                    f"{type(model).__name__} is put together from other tensors than the stored "
                    f"ones ({name!r} first), so its blocks cannot be read one by one; compress it "
                    "in memory (--in-memory)"
                )
        for candidate in (renamed, prefix + renamed, renamed.removeprefix(prefix)):
            if candidate in known:
                found[candidate] = name
                break
    return found
