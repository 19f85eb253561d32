"""Two models timed on this machine, dense beside compressed, with the ideal beside both."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectrim.errors import ModelError
from spectrim.evaluate.bench import Cell, Work, measure_cells, work_of
from spectrim.layers.fusion import fuse
from spectrim.run.job import Progress, Silent
from spectrim.run.loading import load_model
from spectrim.run.reporting import environment

__all__ = ["bench"]

BATCHES = (1, 8, 32)
LENGTHS = (32, 128)
NEW_TOKENS = 16
REPEATS = 3


def bench(
    model: str | Path,
    against: str | Path,
    *,
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    fused: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prefill and decode speed, time to first token and peak memory of two models.

    One model is in memory at a time, so that peak memory is its own.

    Args:
        model: the compressed folder.
        against: the dense model.
        batches: sequences side by side.
        lengths: tokens per prompt.
        new_tokens: tokens to write per sequence.
        repeats: counted runs behind each median.
        fused: join the first factors of the compressed model that read the same input.
        device: `auto`, or a torch device.
        dtype: to work in; `auto` is fp32 on a CPU and the checkpoint's elsewhere.
        trust_remote_code: run code that comes with the checkpoints.
        progress: told of every cell.

    Returns:
        JSON-ready: both models' work and cells, speed-ups with their ideal, hardware, versions.

    Raises:
        SpectrimError: a model that cannot be loaded, or sizes it cannot run.
    """
    progress = progress or Silent()
    measured: dict[str, tuple[Work, list[Cell]]] = {}
    for role, name in (("dense", against), ("compressed", model)):
        loaded = load_model(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        if fused and role == "compressed" and not fuse(loaded.model).groups:
            raise ModelError(f"{name} has no compressed layers that read the same input")
        cells = []
        progress.start(role, len(batches) * len(lengths))
        for cell in measure_cells(
            loaded.model,
            batches=batches,
            lengths=lengths,
            new_tokens=new_tokens,
            repeats=repeats,
        ):
            cells.append(cell)
            progress.advance(role, f"batch {cell.speed.batch}, {cell.speed.prompt_length} tokens")
        progress.finish(role)
        measured[role] = (work_of(loaded.model), cells)
        del loaded
        gc.collect()
    return _record(str(model), str(against), measured, fused)


def _record(
    model: str, against: str, measured: dict[str, tuple[Work, list[Cell]]], fused: bool
) -> dict[str, Any]:
    (dense, before), (compressed, after) = measured["dense"], measured["compressed"]
    one = after[0].speed
    return {
        "format_version": 1,
        "dense": {"model": against, **dense.record(), "cells": [c.record() for c in before]},
        "compressed": {
            "model": model,
            "fused": fused,
            **compressed.record(),
            "cells": [c.record() for c in after],
        },
        "ideal": {
            "decode": dense.bytes / compressed.bytes,
            "prefill": dense.products / compressed.products,
        },
        "speedup": [
            {
                "batch": a.speed.batch,
                "prompt_length": a.speed.prompt_length,
                "decode": a.speed.decode / b.speed.decode,
                "prefill": a.speed.prefill / b.speed.prefill,
            }
            for b, a in zip(before, after, strict=True)
        ],
        "protocol": {
            "new_tokens": one.new_tokens,
            "repeats": one.repeats,
            "device": one.device,
            "dtype": one.dtype,
        },
        "environment": environment(),
    }
