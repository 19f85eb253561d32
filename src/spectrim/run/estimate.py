"""What a run will take, from the configuration and the headers alone: time and peak memory.

Memory is counted as the run allocates it (`footprint.py`). Time is operations over rates that are
measured for a moment on the machine at hand, so it is a rough figure; training steps are not
counted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from spectrim.data.windows import longest_window
from spectrim.decompose import OBJECTIVES
from spectrim.errors import InputError
from spectrim.recipe import Recipe
from spectrim.run.admitting import check_unquantized
from spectrim.run.footprint import Phase, Setting, Sizes, phases, read_sizes, weight_parts
from spectrim.run.loading import read_config
from spectrim.run.memory import goes_out_of_core, resident_bytes
from spectrim.run.out_of_core import check_out_of_core, checkpoint_folder
from spectrim.run.working import resolve_device, resolve_dtype, stored_dtype
from spectrim.storage.admission import admit_folder
from spectrim.storage.shards import Shards

__all__ = ["Estimate", "Setting", "estimate_run"]

_LIBRARIES = 90 * 2**20
"""Code and buffers that are loaded only when a run uses them."""

_READ_RATE = 1e9
"""Bytes per second from a disk."""


@dataclass(frozen=True)
class Estimate:
    """A prediction.

    Attributes:
        setting: what it is for.
        host_parts: peak resident memory of the process by what takes it, bytes.
        device_parts: the same on the accelerator; empty without one.
        seconds: stage -> seconds.
        checkpoint_bytes: of the checkpoint.
    """

    setting: Setting
    host_parts: dict[str, int]
    device_parts: dict[str, int]
    seconds: dict[str, float]
    checkpoint_bytes: int

    @property
    def host_bytes(self) -> int:
        """Peak resident memory of the process."""
        return sum(self.host_parts.values())

    def summary(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "out_of_core": self.setting.out_of_core,
            "device": str(self.setting.device),
            "windows": [self.setting.windows, self.setting.window_length],
            "checkpoint_bytes": self.checkpoint_bytes,
            "host_bytes": self.host_bytes,
            "host_parts": self.host_parts,
            "device_bytes": sum(self.device_parts.values()),
            "device_parts": self.device_parts,
            "seconds": self.seconds,
        }


def estimate_run(
    model: str,
    recipe: Recipe,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    out_of_core: bool | None = False,
    given_ranks: bool = False,
    offloaded: bool = False,
    windows: tuple[int, int] | None = None,
    trust_remote_code: bool = False,
) -> Estimate:
    """Predict a run of the flows one-shot and sequential; no weight is read.

    Args:
        model: folder or name of the checkpoint.
        recipe: resolved.
        device: as for `compress`.
        dtype: as for `compress`.
        out_of_core: whether blocks stay in their files; None decides as `compress` does.
        given_ranks: whether the user brings a plan.
        offloaded: whether streams are mapped to files.
        windows: (N, T) where they differ from the recipe's.
        trust_remote_code: as for `compress`.

    Raises:
        InputError: a learned recipe, whose training is not modeled, or one that cannot be run out
            of core as asked.
        ArtifactError: the checkpoint is damaged.
    """
    if recipe.flow == "learned":
        raise InputError(f"recipe {recipe.name!r} trains on the whole model; it is not predicted")
    lazily = goes_out_of_core(
        model,
        out_of_core,
        check=partial(check_out_of_core, recipe, planned=given_ranks, own_text=windows is not None),
        device=device,
        dtype=dtype,
        kept=True,
        trust_remote_code=trust_remote_code,
    )
    config = read_config(model, trust_remote_code)
    check_unquantized(model, config)
    folder = checkpoint_folder(model)
    admit_folder(folder)
    place = resolve_device(device)
    stored = stored_dtype(config)
    shards = Shards(folder)
    length = recipe.calibration.window_length
    length = min(length, longest_window(config) or length)
    count = windows or (recipe.calibration.windows, length)
    setting = Setting(place, resolve_dtype(dtype, stored, place), stored, lazily, offloaded, *count)
    sizes = read_sizes(config, trust_remote_code)
    weights = weight_parts(setting, sizes)
    base = {"process": resident_bytes() + _LIBRARIES}
    held = phases(recipe, setting, sizes, planned=given_ranks)
    if place.type == "cpu":
        host = base | weights | max(map(_together, held), key=lambda parts: sum(parts.values()))
        accelerator = {}
    else:
        host = base | {"streams": max(phase.streams for phase in held)}
        accelerator = weights | max((p.parts for p in held), key=lambda parts: sum(parts.values()))
    return Estimate(setting, host, accelerator, _times(recipe, setting, sizes), shards.bytes)


def _together(phase: Phase) -> dict[str, int]:
    return {"streams": phase.streams} | phase.parts


def _times(recipe: Recipe, setting: Setting, sizes: Sizes) -> dict[str, float]:
    products, decompositions = _rates(setting)
    tokens = setting.windows * setting.window_length
    needs = OBJECTIVES[recipe.decompose.objective].needs
    forwards = 2 if recipe.flow == "sequential" else int(bool(needs & {"C", "absolute"}))
    if needs & {"G", "fisher"}:
        forwards += 3
    if recipe.storage.kind != "factored" or recipe.storage.weights != "native":
        forwards += 1
    every = sizes.blocks * sizes.block
    work = sizes.blocks * sum(min(m, n) ** 2 * max(m, n) for m, n in sizes.linears)
    sums = sizes.blocks * tokens * sum(n * n for n in sizes.inputs) if forwards else 0
    copies = every * setting.stored.itemsize * (4 if setting.out_of_core else 1)
    return {
        "reading": copies / _READ_RATE,
        "forwards": 2 * forwards * every * tokens / products,
        "moments": 2 * sums / products,
        "decompositions": work / decompositions,
    }


def _rates(setting: Setting) -> tuple[float, float]:
    """Operations per second of fp32 products, and `p² max(m, n)` per second of decompositions."""
    size = 384
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, size, generator=generator).to(setting.device)
    (x @ x).sum().item()
    started = time.perf_counter()
    y = x
    for _ in range(4):
        y = x @ x
    y.sum().item()
    products = 4 * 2 * size**3 / (time.perf_counter() - started)
    W = x.double() if setting.device.type != "mps" else x
    started = time.perf_counter()
    torch.linalg.eigh(W @ W.mT)[0].sum().item()
    torch.linalg.qr(W)[0].sum().item()
    return products, size**3 / (time.perf_counter() - started)
