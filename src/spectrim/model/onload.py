"""Blocks whose weights lie elsewhere: brought into memory when they are worked on, then released.

A model is built on the meta device; embeddings, norms and head are in memory, the members of its
block lists are not. A block is loaded in one of two ways:

    with onloader.hold(name):    # for a pass that works on the block: one load, however many calls
        ...

or by being called: a forward pass of the whole model loads one block after the other, so that
tracing and recording need no other code than for a model in memory. While a block is worked on,
the next one is read by a thread, unless it is large and the work is the host's, beside which
reading takes no time. Weights are looked at once, when they are first loaded.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.devices import on_host
from spectrim.errors import ModelError
from spectrim.model.tracing import block_lists
from spectrim.model.weights import check_finite, get_module, sampled

WAITING = 64e6
"""Bytes of a block above which it does not wait in the memory that blocks are worked on in."""

Source = Callable[[], Mapping[str, Tensor]]
"""Reads a block: name inside the block -> tensor on the CPU, in memory of its own."""


def unit_names(model: nn.Module) -> tuple[str, ...]:
    """Members of the outermost lists of modules with linear layers, in their order.

    Which of the lists holds the decoder's blocks is only known after tracing; every member can be
    loaded by itself.
    """
    outer: list[str] = []
    for name in block_lists(model):
        if not any(name.startswith(f"{other}.") for other in outer):
            outer.append(name)
    return tuple(f"{name}.{i}" for name in outer for i in range(len(get_module(model, name))))  # type: ignore[arg-type]


@dataclass
class _Unit:
    """A block: where its weights come from, and how many hold it in memory now."""

    name: str
    source: Source
    holds: int = 0
    loaded: bool = False


class Onloader:
    """Loads and releases the blocks of one model.

    Args:
        model: on the meta device but for what is not in a block.
        sources: block name -> how to read it, in the order in which the blocks run.
        device: where blocks are worked on.
    """

    def __init__(self, model: nn.Module, sources: Mapping[str, Source], *, device: torch.device):
        self.model = model
        self.device = device
        self._units = {name: _Unit(name, source) for name, source in sources.items()}
        names = list(sources)
        self._after = dict(pairwise(names))
        self._before = {after: name for name, after in self._after.items()}
        self._last: str | None = None
        self._samples: dict[str, Tensor] = {}
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="onload")
        self._coming: tuple[Source, Future[Mapping[str, Tensor]]] | None = None
        self._latest: tuple[Source, Mapping[str, Tensor]] | None = None
        for unit in self._units.values():
            self._watch(unit)

    @contextmanager
    def hold(self, name: str) -> Iterator[nn.Module]:
        """The block in memory for the time of the context; may be nested.

        What stands at `name` when the context ends is released, so a block that was changed must
        have been given a source that reads the changed one (`read_from`).

        Raises:
            ArtifactError: its file is damaged or gone.
            NonFiniteError: a weight holds NaN or infinity.
        """
        unit = self._units[name]
        unit.holds += 1
        try:
            self._load(unit)
            yield get_module(self.model, name)
        finally:
            unit.holds -= 1
            if not unit.holds:
                self._release(unit)

    def read_from(self, name: str, source: Source) -> None:
        """From now on the block is what `source` reads."""
        self._units[name].source = source

    def sources(self) -> dict[str, Source]:
        """Block name -> how it is read now."""
        return {name: unit.source for name, unit in self._units.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor of a block as its source has it, on the CPU; the block is read whole.

        Tensors of one block are best asked for one after the other: the latest block is held.
        """
        unit = self._units[self._unit_of(name)]
        if self._latest is None or self._latest[0] is not unit.source:
            self._latest = None  # first let go of one block, then read the next
            self._latest = (unit.source, unit.source())
        return self._latest[1][name.removeprefix(f"{unit.name}.")]

    def close(self) -> None:
        """Forget what was read ahead and end the thread."""
        self._coming = self._latest = None
        self._reader.shutdown(wait=True, cancel_futures=True)

    def sample(self, name: str) -> Tensor:
        """A few of the values of a parameter as it was first loaded, fp32, (values,)."""
        if name not in self._samples:
            with self.hold(self._unit_of(name)):
                pass
        return self._samples[name]

    def _unit_of(self, parameter: str) -> str:
        return next(unit for unit in self._units if parameter.startswith(f"{unit}."))

    def _watch(self, unit: _Unit) -> None:
        """Load the block when it is called and nobody holds it.

        The hooks are plain functions, which a copy of a block shares; a copy that does not stand
        in the model has weights of its own.
        """

        def concerned(module: nn.Module) -> bool:
            # A forward that was put on the instance stands in for the block and needs no weights.
            bypassed = "forward" in module.__dict__
            standing = get_module(self.model, unit.name) is module
            return standing and not unit.holds and not bypassed

        def arrive(module: nn.Module, _args: Any) -> None:
            if concerned(module):
                self._load(unit)

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            if concerned(module):
                self._release(unit)

        module = get_module(self.model, unit.name)
        module.register_forward_pre_hook(arrive)
        module.register_forward_hook(leave, always_call=True)

    def _load(self, unit: _Unit) -> None:
        if unit.loaded:
            return
        module = get_module(self.model, unit.name)
        wanted = module.state_dict()
        found = dict(self._fetched(unit))
        if wanted.keys() != found.keys():
            odd = sorted(wanted.keys() ^ found.keys())
            raise ModelError(
                f"block {unit.name!r}: {len(odd)} tensors are either missing in the checkpoint or "
                f"unknown to the model, {odd[0]!r} first"
            )
        state = {}
        for name, like in wanted.items():
            if found[name].shape != like.shape:
                raise ModelError(
                    f"{unit.name}.{name} is {tuple(found[name].shape)} in the checkpoint, the "
                    f"model expects {tuple(like.shape)}"
                )
            state[name] = found.pop(name).to(self.device, like.dtype)
        module.load_state_dict(state, assign=True)
        for name, parameter in module.named_parameters():
            path = f"{unit.name}.{name}"
            if path not in self._samples:
                check_finite(path, parameter)
                self._samples[path] = sampled(parameter)
        unit.loaded = True

    def _fetched(self, unit: _Unit) -> Mapping[str, Tensor]:
        """What the block's source reads, read ahead if that was foreseen; looks ahead again."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] is unit.source:
            found = coming[1].result()
        else:
            found = unit.source()
        # Passes go through the blocks forwards, gradients come back through them.
        backwards = self._last is not None and self._last == self._after.get(unit.name)
        following = (self._before if backwards else self._after).get(unit.name)
        self._last = unit.name
        size = sum(t.numel() * t.element_size() for t in found.values())
        waits = on_host(self.device) and size > WAITING
        if following is not None and not self._units[following].loaded and not waits:
            source = self._units[following].source
            self._coming = (source, self._reader.submit(source))
        return found

    def _release(self, unit: _Unit) -> None:
        """Leave shapes and dtypes on the meta device."""
        module = get_module(self.model, unit.name)
        bare = {name: t.to("meta") for name, t in module.state_dict().items()}
        module.load_state_dict(bare, assign=True)
        unit.loaded = False
        give_back()


def give_back() -> None:
    """Return freed memory to the system.

    glibc keeps it: the graph of a backward pass between two of its sums, what the paused forwards
    of a block held between its moments, and in the arena of the thread that reads ahead several
    megabytes more with every block. Over a run that is more than everything else in memory.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@lru_cache(maxsize=1)
def _trim() -> Callable[[int], int] | None:
    """The C library's `malloc_trim`, None where it has no such thing or cannot be asked."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
