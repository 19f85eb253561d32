"""Safetensors files read and written one tensor at a time, in plain reads and writes.

Memory-mapped files count as resident memory and answer a full disk or a file cut short with a
signal that kills the process. Here a file costs the memory of one tensor, and everything that
goes wrong is an exception. Bytes are those that the safetensors library writes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from spectrim.devices import HOST
from spectrim.errors import ArtifactError
from spectrim.storage.headers import read_header
from spectrim.storage.whole_file import CHUNK, whole_file

# The library orders tensors by dtype, the last of this list first, then by name.
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(_DTYPES.values())}


@dataclass(frozen=True)
class Slot:
    """A tensor that is to be written.

    Attributes:
        name: its key.
        dtype: as stored.
        shape: its axes.
        fetch: gives the tensor when its turn comes, in any float dtype and on any device.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Slot:
        """A tensor in memory, stored as it is."""
        return cls(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)


class TensorFile:
    """An existing file: its header is checked once, tensors are read when asked for.

    Attributes:
        path: the file.
        entries: name -> where the tensor lies.

    Raises:
        ArtifactError: the file is missing, truncated or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.entries = read_header(self.path)
        self._start = self.path.stat().st_size - sum(e.bytes for e in self.entries.values())

    def read(self, name: str) -> Tensor:
        """One tensor in memory of its own, on the CPU, as stored.

        Raises:
            ArtifactError: there is no such tensor, or it cannot be read in full.
        """
        tensor = self._empty(name, HOST)
        entry = self.entries[name]
        if not tensor.numel():
            return tensor
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + entry.begin)
                _read_into(file, _bytes_of(tensor))
        except (OSError, EOFError) as error:
            raise ArtifactError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error
        return tensor

    def outline(self, name: str) -> Tensor:
        """Shape and dtype of one tensor, on the meta device."""
        return self._empty(name, "meta")

    def _empty(self, name: str, device: str | torch.device) -> Tensor:
        entry = self.entries.get(name)
        if entry is None:
            raise ArtifactError(f"{self.path} holds no tensor {name!r}")
        if entry.dtype not in _DTYPES:
            raise ArtifactError(
                f"{self.path}: {name!r} has the dtype {entry.dtype}, not one of "
                f"{', '.join(_DTYPES)}"
            )
        return torch.empty(entry.shape, dtype=_DTYPES[entry.dtype], device=device)

    def read_all(self) -> dict[str, Tensor]:
        """Every tensor of the file."""
        return {name: self.read(name) for name in self.entries}

    def metadata(self) -> dict[str, str]:
        """The text that was stored in the header."""
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            found = json.loads(file.read(length)).get("__metadata__", {})
        return found if isinstance(found, dict) else {}


def _read_into(file, place: memoryview) -> None:
    while place:
        count = file.readinto(place)
        if not count:
            raise EOFError(f"the file ends {len(place)} bytes too early")
        place = place[count:]


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def write_tensors(
    path: str | Path, slots: Iterable[Slot], metadata: Mapping[str, str] | None = None
) -> str:
    """Write a file under a temporary name, force it to disk, and give it its name.

    Tensors are fetched one after the other; at no time are two of them held.

    Args:
        path: the file; an older one is replaced.
        slots: what to write, in any order.
        metadata: text for the header.

    Returns:
        SHA-256 of the file.

    Raises:
        OSError: it cannot be written; the temporary file is removed.
    """
    digest = hashlib.sha256()
    with whole_file(Path(path)) as partial, partial.open("wb") as file:
        _write(file, list(slots), dict(metadata or {}), digest.update)
    return digest.hexdigest()


def _write(
    file: BinaryIO,
    slots: list[Slot],
    metadata: dict[str, str],
    note: Callable[[bytes | memoryview], None],
) -> None:
    slots.sort(key=lambda slot: (-_ORDER[slot.dtype], slot.name))
    header, position = {}, 0
    if metadata:
        header["__metadata__"] = metadata
    for slot in slots:
        header[slot.name] = {
            "dtype": _NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [position, position + slot.bytes],
        }
        position += slot.bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    for piece in (len(text).to_bytes(8, "little"), text):
        file.write(piece)
        note(piece)
    for slot in slots:
        tensor = slot.fetch().detach().to(HOST, slot.dtype).contiguous()
        if tuple(tensor.shape) != slot.shape:
            raise ValueError(f"{slot.name} is {tuple(tensor.shape)}, announced as {slot.shape}")
        data = _bytes_of(tensor) if tensor.numel() else memoryview(b"")
        for start in range(0, len(data), CHUNK):
            file.write(data[start : start + CHUNK])
            note(data[start : start + CHUNK])
