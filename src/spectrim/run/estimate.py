"""What a run will take, from the configuration and the headers alone: time and peak memory.

Memory is counted as the run allocates it (`footprint.py`). Time is operations over rates that are
measured for a moment on the machine at hand, so it is a rough figure; training steps are not
counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from spectrim.data.windows import longest_window
from spectrim.errors import InputError
from spectrim.recipe import Recipe
from spectrim.run.admitting import check_unquantized
from spectrim.run.cost import LONG, MOST_TOKENS, costs, measured_rates, settle, stage_seconds
from spectrim.run.footprint import Room, Setting, Sizes, read_sizes
from spectrim.run.loading import read_config
from spectrim.run.memory import goes_out_of_core, total_bytes
from spectrim.run.options import RunOptions
from spectrim.run.out_of_core import check_out_of_core, checkpoint_folder
from spectrim.run.restoring import stored_after
from spectrim.run.room import choose_room, limit_of, peak_parts, said
from spectrim.run.working import resolve_device, resolve_dtype, stored_dtype
from spectrim.storage.admission import admit_folder
from spectrim.storage.shards import Shards

_READ_RATE = 1e9
"""Bytes per second from a disk."""


@dataclass(frozen=True)
class Estimate:
    """A prediction.

    Attributes:
        setting: what it is for.
        room: how it will be made to fit.
        host_parts: peak memory of the process by what takes it, bytes; files that are mapped, a
            program's own among them, are not counted.
        device_parts: the same on the accelerator; empty without one.
        seconds: stage -> seconds.
        checkpoint_bytes: of the checkpoint.
        reason: why so many windows, where nobody has said how many.
        more: seconds and host_bytes with as many windows as papers use, where these are fewer.
    """

    setting: Setting
    room: Room
    host_parts: dict[str, int]
    device_parts: dict[str, int]
    seconds: dict[str, float]
    checkpoint_bytes: int
    reason: str = ""
    more: dict[str, Any] | None = None

    @property
    def host_bytes(self) -> int:
        """Peak resident memory of the process that no file backs."""
        return sum(self.host_parts.values())

    def summary(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "out_of_core": self.setting.out_of_core,
            "device": str(self.setting.device),
            "windows_because": self.reason,
            "passes": said(self.room),
            "room": asdict(self.room),
            "more": self.more,
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
    options: RunOptions = RunOptions(),
    *,
    given_ranks: bool = False,
    windows: tuple[int, int] | None = None,
) -> Estimate:
    """Predict a run of the flows one-shot and sequential; no weight is read.

    Args:
        model: folder or name of the checkpoint.
        recipe: resolved.
        options: as for `compress`.
        given_ranks: whether the user brings a plan.
        windows: (N, T) where they differ from the recipe's.

    Raises:
        InputError: a learned recipe, whose training is not modeled, or one that cannot be run out
            of core as asked.
        ArtifactError: the checkpoint is damaged.
    """
    if recipe.flow == "learned":
        raise InputError(f"recipe {recipe.name!r} trains on the whole model; it is not predicted")
    lazily = goes_out_of_core(
        model,
        options,
        check=partial(check_out_of_core, recipe, planned=given_ranks, own_text=windows is not None),
        kept=True,
    )
    config = read_config(model, options.trust_remote_code, restoring=options.dequantize)
    if Path(model).is_file():
        raise InputError(f"{model} is one file; runs are predicted from the headers of safetensors")
    if not options.dequantize:
        check_unquantized(model, config)
    folder = checkpoint_folder(model)
    admit_folder(folder)
    place = resolve_device(options.device)
    stored = stored_after(stored_dtype(config)) if options.dequantize else stored_dtype(config)
    shards = Shards(folder)
    sizes = read_sizes(config, options.trust_remote_code)
    recipe, how = settle(recipe, sizes, place, longest_window(config), windows)
    count = windows or (how.windows, how.window_length)
    working = resolve_dtype(options.dtype, stored, place)
    setting = Setting(place, working, stored, lazily, options.streams is not None, *count)
    one = partial(_predicted, recipe, sizes, shards.bytes, given_ranks, measured_rates(place))
    found = one(setting)
    whole = min(LONG, longest_window(config) or LONG)
    if not how.reason or how.windows * how.window_length >= MOST_TOKENS // LONG * whole:
        return found
    more = one(replace(setting, windows=MOST_TOKENS // LONG, window_length=whole))
    costs_more = {"seconds": sum(more.seconds.values()), "host_bytes": more.host_bytes}
    return replace(found, reason=how.reason, more=costs_more)


def _predicted(
    recipe: Recipe,
    sizes: Sizes,
    checkpoint: int,
    planned: bool,
    rates: tuple[float, float],
    setting: Setting,
) -> Estimate:
    """The estimate of one setting."""
    limit = limit_of(total_bytes(setting.device), setting.device)
    batch = recipe.calibration.batch
    room = choose_room(recipe, setting, sizes, planned=planned, limit=limit, batch=batch)
    host, accelerator = peak_parts(recipe, setting, sizes, room, planned=planned)
    seconds = _times(recipe, setting, sizes, room, rates)
    return Estimate(setting, room, host, accelerator, seconds, checkpoint)


def _times(
    recipe: Recipe, setting: Setting, sizes: Sizes, room: Room, rates: tuple[float, float]
) -> dict[str, float]:
    numbers = sizes.blocks * sizes.block * setting.stored.itemsize
    reading = {"reading": numbers * (4 if setting.out_of_core else 1) / _READ_RATE}
    return reading | stage_seconds(costs(recipe, setting, sizes, room), setting.device, rates)
