"""How a run is made to fit into a machine: chosen before it begins, from sizes alone.

Of all ways to run, the fastest is taken whose predicted peak stays under half of the memory that
the machine has in all; what other programs leave free at the moment plays no part, so that the
same command does the same again. What does not even fit in the thriftiest way is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from spectrim.devices import on_host
from spectrim.errors import InputError
from spectrim.recipe import Recipe
from spectrim.run.footprint import Room, Setting, Sizes
from spectrim.run.phases import (
    Phase,
    correction_phase,
    cut_phase,
    gradient_phase,
    has_gradients,
    weight_parts,
)

BASE = 300 * 2**20
"""What interpreter and libraries take, and buffers that are loaded only when a run uses them."""

SHARE_OF_MEMORY = 0.5
SHARE_OF_ACCELERATOR = 0.85
"""A run may take this share of a machine's memory, or of an accelerator's, which it has alone."""

SHARE_OF_GRAPH = 0.25
"""The graph of all blocks may take this share of what a run may take: recomputing costs little."""

TOKENS_HERE = 2048
TOKENS_ELSEWHERE = 16384
"""Tokens per forward pass from which products are no faster with more."""


def limit_of(total: int | None, device: torch.device) -> int | None:
    """Bytes that a run may take of a place's, None where that is not known."""
    share = SHARE_OF_MEMORY if on_host(device) else SHARE_OF_ACCELERATOR
    return None if total is None else int(total * share)


def choose_room(
    recipe: Recipe,
    setting: Setting,
    sizes: Sizes,
    *,
    planned: bool,
    limit: int | None,
    batch: int | None = None,
) -> Room:
    """The fastest way that fits, or the thriftiest one if none does.

    Args:
        recipe: resolved.
        setting: where it runs, and on which windows.
        sizes: of the model.
        planned: whether the ranks are given.
        limit: bytes that the run may take, None for as many as it likes.
        batch: windows per pass, where the user has said so.
    """
    fixed = sum(weight_parts(setting, sizes).values()) + _base(setting)
    gathers, backward = has_gradients(recipe, planned=planned)
    most = TOKENS_HERE if on_host(setting.device) else TOKENS_ELSEWHERE
    choice = Room(batch or 1, batch or 1)
    for room in _rooms(setting, most, batch):
        if _fits(fixed, cut_phase(recipe, setting, sizes, room), limit, setting):
            choice = room
            break
    else:
        choice = room
    if not backward:
        return choice
    for room in _backward_rooms(setting, choice, most, batch, by_block=gathers):
        phase = gradient_phase(recipe, setting, sizes, room)
        graph = phase.parts["activations"]
        if room.backward == "whole" and limit is not None and graph > SHARE_OF_GRAPH * limit:
            continue
        if _fits(fixed, phase, limit, setting):
            return room
    return room


def fitting_room(
    recipe: Recipe,
    setting: Setting,
    sizes: Sizes,
    *,
    planned: bool,
    total: int | None,
    batch: int | None = None,
) -> Room:
    """The room of a run on a machine with so many bytes in all; arguments as for `choose_room`.

    Raises:
        InputError: in the thriftiest way it needs more than there is; gives the numbers.
    """
    limit = limit_of(total, setting.device)
    room = choose_room(recipe, setting, sizes, planned=planned, limit=limit, batch=batch)
    host, device = peak_parts(recipe, setting, sizes, room, planned=planned)
    # Where blocks are worked on elsewhere, what this machine holds is streams.
    _check_fits(host if on_host(setting.device) else device, total, str(setting.device))
    return room


def said(room: Room) -> str:
    """A room in words."""
    gradients = {
        "whole": "",
        "recomputed": ", activations computed again in the backward pass",
        "by block": ", gradients block by block",
    }[room.backward]
    begun = ", forwards begun anew at every group" if room.restarts else ""
    return f"{room.batch} windows per pass{gradients}{begun}"


def _base(setting: Setting) -> int:
    return BASE if on_host(setting.device) else 0


def _fits(fixed: int, phase: Phase, limit: int | None, setting: Setting) -> bool:
    streams = phase.streams if on_host(setting.device) and not setting.offloaded else 0
    return limit is None or fixed + streams + sum(phase.parts.values()) <= limit


def _sizes_of_batch(setting: Setting, tokens: int, batch: int | None) -> Iterator[int]:
    """Numbers of windows, the largest first."""
    if batch is not None:
        yield batch
        return
    size = max(1, min(setting.windows, tokens // setting.window_length))
    while size >= 1:
        yield size
        size //= 2


def _rooms(setting: Setting, tokens: int, batch: int | None) -> Iterator[Room]:
    for restarts in (setting.offloaded, True):
        for size in _sizes_of_batch(setting, tokens, batch):
            yield Room(size, size, restarts=restarts)


def _backward_rooms(
    setting: Setting, room: Room, tokens: int, batch: int | None, *, by_block: bool
) -> Iterator[Room]:
    # The graph of all blocks is held at once: a quarter of the tokens is as fast.
    if not setting.out_of_core:
        for size in _sizes_of_batch(setting, tokens // 4, batch):
            yield Room(room.batch, size, "whole", room.restarts)
        for size in _sizes_of_batch(setting, tokens, batch):
            yield Room(room.batch, size, "recomputed", room.restarts)
    if setting.out_of_core or by_block:
        for size in _sizes_of_batch(setting, tokens, batch):
            yield Room(room.batch, size, "by block", room.restarts)


def peak_parts(
    recipe: Recipe, setting: Setting, sizes: Sizes, room: Room, *, planned: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes by what takes them at the peak, on the host and on the accelerator."""
    held = [
        cut_phase(recipe, setting, sizes, room),
        correction_phase(recipe, setting, sizes),
    ]
    if has_gradients(recipe, planned=planned)[1]:
        held.append(gradient_phase(recipe, setting, sizes, room))
    weights = weight_parts(setting, sizes)
    if on_host(setting.device):
        parts = [{"streams": phase.streams} | phase.parts for phase in held]
        if setting.offloaded:  # mapped files make room when it is needed
            parts = [part | {"streams": 0} for part in parts]
        largest = max(parts, key=lambda part: sum(part.values()))
        return {"process": BASE} | weights | largest, {}
    streams = 0 if setting.offloaded else max(phase.streams for phase in held)
    largest = max((p.parts for p in held), key=lambda part: sum(part.values()))
    return {"process": BASE, "streams": streams}, weights | largest


def _check_fits(parts: dict[str, int], total: int | None, where: str) -> None:
    needed = sum(parts.values())
    if total is None or needed <= total:
        return
    largest = max(parts, key=lambda name: parts[name])
    raise InputError(
        f"this run needs about {needed / 1e9:.1f} GB of memory ({where}) and there are "
        f"{total / 1e9:.1f}; most of it is for {largest}, {parts[largest] / 1e9:.1f} GB: use fewer "
        "or shorter windows, a smaller --batch, --out-of-core, or --offload-streams DIR"
    )
