"""What a folder holds, from its headers alone: ranks, shapes, dtypes and bytes of every target.

No weight is read and torch is not imported, so a 70B result is inspected in a moment. The achieved
keep is recounted from what lies on disk, not copied from what a run claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from spectrim.errors import ArtifactError
from spectrim.layers.layout import layout_of
from spectrim.storage.headers import DTYPE_BITS, TensorEntry, read_header
from spectrim.storage.json_file import read_json
from spectrim.storage.table import QUANT_METHOD, LayerEntry, Table, parse_table
from spectrim.storage.weight_files import checkpoint_files

ORDER_DTYPE = "I32"
"""Of the permutations in packed layers, the only 32-bit integers of a model folder."""


@dataclass(frozen=True)
class StoredTarget:
    """One target as it lies on disk.

    Attributes:
        name: its path in the file.
        storage: `dense`, or a storage kind of `layers.layout`.
        weights: number format of the stored matrix.
        rank: components kept, None where it is dense.
        out_features: m.
        in_features: n.
        bias: whether a bias is stored.
        dtype: of the model's own numbers, e.g. `BF16`; of the stored matrices if those are native.
        bytes: stored bytes, bias included.
        dense_bytes: bytes of the dense layer in the same dtype, bias included.
    """

    name: str
    storage: str
    weights: str
    rank: int | None
    out_features: int
    in_features: int
    bias: bool
    dtype: str
    bytes: int
    dense_bytes: int

    @property
    def kept(self) -> float:
        """Stored over dense bytes."""
        return self.bytes / self.dense_bytes


@dataclass(frozen=True)
class FolderInspection:
    """A whole folder.

    Attributes:
        path: the folder.
        table: the spectrim part of its `config.json`, None for an ordinary model.
        targets: compressed layers, then targets that stayed dense.
        tensors: every tensor of every file.
        files: file name -> size of each weight file.
    """

    path: Path
    table: Table | None
    targets: tuple[StoredTarget, ...]
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Numbers stored in all tensors; the orders of packed layers are not parameters."""
        stored = (entry for entry in self.tensors.values() if entry.dtype != ORDER_DTYPE)
        return sum(prod(entry.shape) for entry in stored)

    @property
    def target_bytes(self) -> int:
        """Stored bytes of all targets."""
        return sum(target.bytes for target in self.targets)

    @property
    def dense_target_bytes(self) -> int:
        """Bytes of all targets if they were dense."""
        return sum(target.dense_bytes for target in self.targets)

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors if the targets were dense."""
        return self.bytes - self.target_bytes + self.dense_target_bytes

    @property
    def achieved_keep(self) -> float | None:
        """Stored over dense bytes of all targets; None for an ordinary model."""
        return self.target_bytes / self.dense_target_bytes if self.targets else None

    def summary(self) -> dict[str, Any]:
        """The totals as plain data for the report."""
        return {
            "bytes": self.bytes,
            "dense_bytes": self.dense_bytes,
            "target_bytes": self.target_bytes,
            "dense_target_bytes": self.dense_target_bytes,
            "achieved_keep": self.achieved_keep,
            "parameters": self.parameters,
            "files": dict(self.files),
        }


def inspect_folder(path: str | Path) -> FolderInspection:
    """Read the configuration and the headers of a model folder.

    Raises:
        ArtifactError: something is missing, damaged or contradictory; names file and tensor.
    """
    folder = Path(path)
    config = read_json(folder / "config.json")
    stated = config.get("quantization_config")
    table = None
    if isinstance(stated, dict) and stated.get("quant_method") == QUANT_METHOD:
        table = parse_table(stated, source=str(folder / "config.json"))
    files = checkpoint_files(folder)
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in tensors:
                raise ArtifactError(
                    f"tensor {name!r} is in {tensors[name].file} and in {entry.file}"
                )
            tensors[name] = entry
    targets: list[StoredTarget] = []
    if table is not None:
        finder = _Finder(folder, tensors, _native_dtype(config, tensors), table.on_disk)
        targets += [finder.compressed(name, entry) for name, entry in table.layers.items()]
        targets += [finder.dense(name) for name in table.left_dense]
    sizes = {file.name: file.stat().st_size for file in files}
    return FolderInspection(folder, table, tuple(targets), tensors, sizes)


_DTYPE_WORDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


def _native_dtype(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> str:
    """The dtype of the model's own numbers, as safetensors spells it."""
    text = config.get("text_config")
    nested = text if isinstance(text, dict) else {}
    stated = next(
        (c[k] for c in (config, nested) for k in ("dtype", "torch_dtype") if c.get(k)), None
    )
    if isinstance(stated, str) and stated in _DTYPE_WORDS:
        return _DTYPE_WORDS[stated]
    floats = [e.dtype for e in tensors.values() if e.dtype in _DTYPE_WORDS.values()]
    return max(sorted(set(floats)), key=floats.count, default="F32")


def _stated(entry: LayerEntry) -> tuple[int, int, int]:
    """(out, in, rank) from the configuration, with rank 0 for a layer that was not cut."""
    if entry.shape is None:
        raise ValueError("an entry with coded weights has a shape, see parse_table")
    return (*entry.shape, entry.rank or 0)


class _Finder:
    """Looks up layers, named relative to the base model, among the tensors of a folder."""

    def __init__(
        self,
        folder: Path,
        tensors: Mapping[str, TensorEntry],
        native: str,
        on_disk: Mapping[str, str],
    ):
        self.folder = folder
        self.tensors = tensors
        self.native = native
        self.on_disk = on_disk
        self.paths: dict[str, str] = {}
        for key in sorted(tensors, key=len, reverse=True):
            path, _, last = key.rpartition(".")
            # The shortest path that ends with a name comes last and wins.
            while path and last == "weight":
                self.paths[path] = key.removesuffix(".weight")
                _, _, path = path.partition(".")

    def compressed(self, name: str, entry: LayerEntry) -> StoredTarget:
        """A compressed layer, its shapes checked against rank and storage."""
        layout = layout_of(entry.storage, entry.weights)
        path = self._path(name)
        keys = layout.tensors(1, 1, 1, bias=False)
        integers = layout.coded
        found = {key: self._tensor(f"{path}.{layout.disk_key(key)}", name) for key in keys}
        shapes = {layout.disk_key(key): tensor.shape for key, tensor in found.items()}
        bias = self.tensors.get(f"{path}.bias")
        weight = found[layout.weight_key]
        try:
            m, n, rank = _stated(entry) if layout.states_shape else layout.dimensions(shapes)
        except ValueError:
            m, n, rank = 0, 0, 0
        if rank != (entry.rank or 0) or any(
            found[key].shape != shape for key, shape in layout.shapes(m, n, rank).items()
        ):
            listed = ", ".join(f"{key} {list(shape)}" for key, shape in shapes.items())
            raise ArtifactError(
                f"{self.folder / weight.file}: the tensors of {path} ({listed}) do not fit "
                f"{entry.storage} storage of rank {entry.rank} with {entry.weights} weights"
            )
        if min(m, n) < 1:
            raise ArtifactError(f"{self.folder / weight.file}: the layer {path} is empty")
        parts = [*found.values(), *([bias] if bias else [])]
        # Bytes are held against the dense layer in the dtype that the model has besides.
        dtype = self.native if integers else weight.dtype
        return StoredTarget(
            name=path,
            storage=entry.storage,
            weights=entry.weights,
            rank=entry.rank,
            out_features=m,
            in_features=n,
            bias=bias is not None,
            dtype=dtype,
            bytes=sum(part.bytes for part in parts),
            dense_bytes=m * n * DTYPE_BITS[dtype] // 8 + (bias.bytes if bias else 0),
        )

    def dense(self, name: str) -> StoredTarget:
        """A target that kept its weight."""
        path = self._path(name)
        weight, bias = self.tensors[f"{path}.weight"], self.tensors.get(f"{path}.bias")
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise ArtifactError(
                f"{self.folder / weight.file}: tensor {weight.name!r} has shape "
                f"{list(weight.shape)}, expected a matrix"
            )
        m, n = weight.shape
        if bias is not None and bias.shape == (n,) and n != m:
            m, n = n, m  # a Conv1D, which stores (in, out)
        total = weight.bytes + (bias.bytes if bias else 0)
        return StoredTarget(
            path, "dense", "native", None, m, n, bias is not None, weight.dtype, total, total
        )

    def _path(self, name: str) -> str:
        name = self.on_disk.get(name, name)
        if name not in self.paths:
            raise ArtifactError(f"{self.folder} lacks the tensor '{name}.weight'")
        return self.paths[name]

    def _tensor(self, key: str, name: str) -> TensorEntry:
        if key not in self.tensors:
            raise ArtifactError(f"{self.folder} lacks the tensor {key!r} of the layer {name}")
        return self.tensors[key]
