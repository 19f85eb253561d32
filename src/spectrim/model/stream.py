"""Hidden states of all calibration windows between two blocks, in memory or mapped to a file."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from spectrim.devices import HOST
from spectrim.errors import OutputError


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


class Stream:
    """Hidden states `(N, T, d)` on the CPU, in the model's dtype.

    With a folder the states live in a memory-mapped file there, which is removed when the stream
    is closed or forgotten; the operating system then decides what stays in memory.

    Attributes:
        path: the mapped file, or None for a stream in memory.
    """

    def __init__(self, states: Tensor, path: Path | None = None):
        if states.ndim != 3:
            raise ValueError(f"a stream holds (N, T, d), found {tuple(states.shape)}")
        self._states = states
        self.path = path
        self._cleanup = None if path is None else weakref.finalize(self, _remove, path)

    @classmethod
    def empty(
        cls, n: int, t: int, d: int, dtype: torch.dtype, folder: Path | str | None = None
    ) -> Stream:
        """Room for `n` windows of `t` tokens of width `d`; mapped to a new file in `folder`.

        Raises:
            OutputError: the folder cannot be written, or the disk is too small for the file.
        """
        if folder is None:
            return cls(torch.empty(n, t, d, dtype=dtype))
        size, path = n * t * d * dtype.itemsize, None
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix="stream-", suffix=".bin", dir=folder)
            path = Path(name)
            with os.fdopen(handle, "wb") as file:
                # Reserving the room now turns a full disk into an error here; writing to a
                # mapping of a file with holes would kill the process instead.
                _reserve(file.fileno(), size)
        except OSError as error:
            if path is not None:
                _remove(path)
            raise OutputError(
                f"no room for hidden states of {size} bytes in {folder}: "
                f"{error.strerror or error}; offload to another folder, or use fewer windows"
            ) from error
        states = torch.from_file(name, shared=True, size=n * t * d, dtype=dtype)
        return cls(states.view(n, t, d), path)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N windows, T tokens, d width)."""
        n, t, d = self._states.shape
        return n, t, d

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored states."""
        return self._states.dtype

    def __len__(self) -> int:
        return self._states.shape[0]

    def batches(self, batch: int) -> Iterator[slice]:
        """Slices of at most `batch` windows that cover the stream in order."""
        if batch < 1:
            raise ValueError(f"batch is {batch}, expected at least 1")
        for start in range(0, len(self), batch):
            yield slice(start, min(start + batch, len(self)))

    def read(self, rows: slice | Tensor, device: torch.device | str = HOST) -> Tensor:
        """A copy of the states of some windows, shape (rows, T, d), on `device`.

        `rows` is a slice or an integer tensor of window indices.
        """
        return self._states[rows].to(device, copy=True)

    @torch.no_grad()
    def write(self, rows: slice, states: Tensor) -> None:
        """Overwrite the states of some windows; cast to the stream's dtype."""
        place = self._states[rows]
        if states.shape != place.shape:
            raise ValueError(f"states are {tuple(states.shape)}, expected {tuple(place.shape)}")
        place.copy_(states)

    def leading(self, count: int) -> Stream:
        """The first `count` windows, in the memory of this stream."""
        return Stream(self._states[:count])

    def duplicate(self, folder: Path | str | None = None) -> Stream:
        """A second stream with the same states, in memory or in `folder`."""
        other = Stream.empty(*self.shape, self.dtype, folder)
        other._states.copy_(self._states)
        return other

    def close(self) -> None:
        """Forget the states and remove the file, if there is one."""
        self._states = self._states.new_empty(0, *self._states.shape[1:])
        if self._cleanup is not None:
            self._cleanup()


def _reserve(descriptor: int, size: int) -> None:
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)
