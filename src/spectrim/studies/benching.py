"""Two models timed on this machine, dense beside compressed, with the ideal beside both.

Both are prepared for the device first (`serve.prepare`): a prepared model beside one as it was
loaded would compare kernels, not models. The latent cache, which only a compressed model can have,
is timed beside the ordinary one, because it pays for memory with time.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spectrim.arguments import check_whole
from spectrim.errors import ModelError
from spectrim.layers.swap import compressed_layers
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions
from spectrim.run.progress import Progress
from spectrim.run.reporting import environment
from spectrim.serve.bench import Cell, Work, measure_cells, paths_of, uncut_bytes, work_of
from spectrim.serve.latent.switch import latent_cache as switch_over
from spectrim.serve.prepare import Prepared, prepare


@dataclass(frozen=True)
class Timing:
    """What is timed.

    Attributes:
        batches: sequences side by side.
        lengths: tokens per prompt.
        new_tokens: tokens to write per sequence.
        repeats: counted runs behind each median.
        prepared: arrange the weights of both for this device before they are timed.
        memory: what the compressed model's weights may take then, see `serve.prepare`.
        latent_cache: measure the compressed model once more with a latent key-value cache.
    """

    batches: Sequence[int] = (1, 8, 32)
    lengths: Sequence[int] = (32, 128)
    new_tokens: int = 16
    repeats: int = 3
    prepared: bool = True
    memory: int | str | None = None
    latent_cache: bool = False

    def __post_init__(self) -> None:
        check_whole(new_tokens=self.new_tokens, repeats=self.repeats)
        for batch in self.batches:
            check_whole(batches=batch)
        for length in self.lengths:
            check_whole(lengths=length)


@dataclass(frozen=True)
class _Measured:
    """One model: its work, its cells, and the bytes that rounding alone would leave."""

    work: Work
    cells: list[Cell]
    latent: list[Cell] | None
    uncut: dict[str, int]
    prepared: Prepared | None
    paths: dict[str, int]


def bench(
    model: str | Path,
    against: str | Path,
    options: RunOptions = RunOptions(),
    timing: Timing = Timing(),
) -> dict[str, Any]:
    """Prefill and decode speed, time to first token, memory and cache of two models.

    One model is in memory at a time, so that peak memory is its own.

    Args:
        model: the compressed folder.
        against: the dense model.
        options: how both are loaded, and who is told of every cell.
        timing: what is timed.

    Returns:
        JSON-ready: both models' work and cells, speed-ups with their ideal, hardware, versions.

    Raises:
        SpectrimError: a model that cannot be loaded, sizes it cannot run, or memory that is less
            than its weights take.
    """
    measured = {}
    for role, name in (("dense", against), ("compressed", model)):
        loaded = load_model(name, options)
        network: Any = loaded.model
        _check_role(network, str(name), role)
        uncut = uncut_bytes(network, work_of(network))
        limit = timing.memory if role == "compressed" else None
        chosen = prepare(network, memory=limit) if timing.prepared else None
        cells = _cells(network, role, timing, options.progress)
        latent = None
        if timing.latent_cache and role == "compressed":
            switch_over(network)
            latent = _cells(network, "latent cache", timing, options.progress)
        paths = paths_of(network)
        measured[role] = _Measured(work_of(network), cells, latent, uncut, chosen, paths)
        del loaded, network
        gc.collect()
    return _record(str(model), str(against), measured)


def _check_role(network: Any, name: str, role: str) -> None:
    """Two names in the wrong places give ratios that nobody would notice to be upside down."""
    compressed = bool(compressed_layers(network))
    if role == "dense" and compressed:
        raise ModelError(
            f"--against {name} is compressed itself; name the dense model that it came from"
        )
    if role == "compressed" and not compressed:
        raise ModelError(
            f"{name} has no compressed layers; the first name is the compressed folder, "
            "--against the dense model"
        )


def _cells(network: Any, stage: str, timing: Timing, progress: Progress) -> list[Cell]:
    progress.start(stage, len(timing.batches) * len(timing.lengths))
    cells = []
    sizes = ("batches", "lengths", "new_tokens", "repeats")
    for cell in measure_cells(network, **{name: getattr(timing, name) for name in sizes}):
        cells.append(cell)
        progress.advance(stage, f"batch {cell.speed.batch}, {cell.speed.prompt_length} tokens")
    progress.finish(stage)
    return cells


def _record(model: str, against: str, measured: dict[str, _Measured]) -> dict[str, Any]:
    dense, compressed = measured["dense"], measured["compressed"]
    one = compressed.cells[0].speed
    record = {
        "format_version": 1,
        "dense": {
            "model": against,
            **dense.work.record(),
            "cells": [c.record() for c in dense.cells],
        },
        "compressed": {
            "model": model,
            "prepared": None if compressed.prepared is None else compressed.prepared.record(),
            **compressed.work.record(),
            "paths": compressed.paths,
            "cells": [c.record() for c in compressed.cells],
        },
        "ideal": {
            "decode": dense.work.bytes / compressed.work.bytes,
            "prefill": dense.work.products / compressed.work.products,
        },
        "uncut_bytes": compressed.uncut,
        "speedup": _speedups(dense.cells, compressed.cells),
        "protocol": {
            "new_tokens": one.new_tokens,
            "repeats": one.repeats,
            "device": one.device,
            "dtype": one.dtype,
        },
        "environment": environment(),
    }
    if compressed.latent is not None:
        record["latent_cache"] = {
            "cells": [c.record() for c in compressed.latent],
            "speedup_over_ordinary_cache": _speedups(compressed.cells, compressed.latent),
        }
    return record


def _speedups(before: list[Cell], after: list[Cell]) -> list[dict[str, Any]]:
    return [
        {
            "batch": a.speed.batch,
            "prompt_length": a.speed.prompt_length,
            "decode": a.speed.decode / b.speed.decode,
            "prefill": a.speed.prefill / b.speed.prefill,
        }
        for b, a in zip(before, after, strict=True)
    ]
