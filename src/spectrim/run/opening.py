"""The beginning of every run: check the model, find its targets, resolve the size, get windows."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.allocate.curve import shape_curves
from spectrim.data.windows import Windows, longest_window
from spectrim.devices import on_host
from spectrim.distributed.team import Team
from spectrim.errors import InputError
from spectrim.model.anatomy import Anatomy
from spectrim.model.choosing import PROTECTED, check_patterns, choose_targets
from spectrim.model.onload import unit_names
from spectrim.model.tracing import trace
from spectrim.model.weights import check_model, get_module
from spectrim.recipe import Recipe
from spectrim.run.cost import calibrated_on, costs, settle, stage_seconds
from spectrim.run.experts import check_understood, open_experts, short_window
from spectrim.run.footprint import Room, Setting, Sizes, sizes_of
from spectrim.run.identity import run_identity
from spectrim.run.job import Job, RunLog
from spectrim.run.keeping import Keeper
from spectrim.run.loading import LoadedModel
from spectrim.run.memory import total_bytes
from spectrim.run.options import RunOptions
from spectrim.run.planning import check_keep_reachable, keep_of_size
from spectrim.run.progress import Progress
from spectrim.run.rehearsing import check_class, rehearse
from spectrim.run.room import choose_room, fitting_room, limit_of, peak_parts, said
from spectrim.run.texts import UserText, gather_windows
from spectrim.run.thinness import thin_notes
from spectrim.storage.shared_work import Work

logger = logging.getLogger(__name__)


def other_bytes(model: nn.Module, anatomy: Anatomy, dtype: torch.dtype) -> int:
    """Bytes of all parameters and buffers that are not targets, tied ones counted once."""
    inside = {f"{t.name}." for t in anatomy.targets}
    total = 0
    for name, p in model.named_parameters():
        if not any(name.startswith(prefix) for prefix in inside):
            total += p.numel() * dtype.itemsize
    return total


def protected_bytes(model: nn.Module, anatomy: Anatomy, dtype: torch.dtype) -> int:
    """Bytes of the targets that the user's patterns protect."""
    names = [name for name, why in anatomy.left_alone.items() if why.startswith(PROTECTED)]
    layers = (get_module(model, name) for name in names)
    return sum(p.numel() * dtype.itemsize for layer in layers for p in layer.parameters())


def open_job(
    loaded: LoadedModel,
    recipe: Recipe,
    options: RunOptions = RunOptions(),
    *,
    text: UserText = None,
    calibrate: bool = True,
    size: int | None = None,
    work: Work | None = None,
    brought: Mapping[str, Any] | None = None,
) -> Job:
    """A run that is ready to begin; the model is as it was.

    Args:
        loaded: the model.
        recipe: resolved, with its keep.
        options: how and where; all processes of their team open the run.
        text: the user's calibration text, None for the recipe's.
        calibrate: whether windows are needed at all.
        size: bytes of the whole checkpoint to reach, in place of the recipe's keep.
        work: where finished pieces are kept; earlier ones of the same run are taken up.
        brought: the user's plan and survey, None for a run that plans for itself, and other
            settings that the pieces depend on.

    Raises:
        SpectrimError: an unfit model, an unknown text, a size out of reach, the work of another
            run.
    """
    model, log = loaded.model, RunLog(notes=list(loaded.notes))
    check_class(model)
    check_model(model, elsewhere=() if loaded.onloader is None else unit_names(model))
    open_experts(loaded)
    anatomy = _targets(loaded, recipe, log)
    brought = brought or {}
    recipe = _sized(loaded, recipe, anatomy, size, brought)
    windows: Windows | None = None
    room: Room | None = None
    if calibrate:
        planned = brought.get("plan") is not None
        recipe, windows, room = _calibrated(loaded, recipe, options, text, log, planned=planned)
        log.notes.extend(thin_notes(windows, anatomy, longest_window(model.config)))
    if work is not None:
        # Sums over other parts of the windows round in another way.
        brought = {"processes": options.team.size, "on_failure": options.on_failure, **brought}
        room = _begun(work, run_identity(loaded, recipe, windows, **brought), room, loaded, log)
    return Job(
        model=model,
        anatomy=anatomy,
        windows=windows,
        recipe=recipe,
        device=loaded.device,
        options=options,
        log=log,
        dtype_bytes=loaded.stored_dtype.itemsize,
        room=room,  # type: ignore[arg-type]
        keeper=Keeper(model, log, work=work, onloader=loaded.onloader),
    )


def _targets(loaded: LoadedModel, recipe: Recipe, log: RunLog) -> Anatomy:
    """The model's blocks with the targets of this run; a twin of it was saved and loaded."""
    targets = recipe.targets
    anatomy = trace(loaded.model, short_window(loaded))
    partial_note = check_understood(loaded, anatomy, partly=targets.partly)
    if partial_note is not None:
        log.notes.append(partial_note)
    rehearse(loaded.model, anatomy)
    anatomy = choose_targets(anatomy, targets.only, targets.skip)
    check_patterns([own.match for own in targets.own], [t.name for t in anatomy.targets])
    return anatomy


def _sized(
    loaded: LoadedModel,
    recipe: Recipe,
    anatomy: Anatomy,
    size: int | None,
    brought: Mapping[str, Any],
) -> Recipe:
    """The recipe with the keep of a size.

    Raises:
        BudgetError: no plan has that size, or the keep of a run that plans for itself.
    """
    curves, dtype = shape_curves(anatomy), loaded.stored_dtype
    if size is not None:
        other = other_bytes(loaded.model, anatomy, dtype)
        keep = keep_of_size(size, recipe, curves, other, dtype.itemsize)
        return recipe.with_changes(keep=keep)
    if all(brought.get(name, "") is None for name in ("plan", "survey")):
        check_keep_reachable(recipe, curves, dtype.itemsize)
    return recipe


def _begun(
    work: Work, identity: dict[str, Any], room: Room | None, loaded: LoadedModel, log: RunLog
) -> Room | None:
    """How the run fits, as decided when its work was begun: now, or by an earlier process."""
    decided = work.begin(identity, {} if room is None else {"room": asdict(room)})
    room = room and Room(**decided["room"])
    if loaded.onloader is not None or (room is not None and room.backward == "by block"):
        work.keep_here()  # blocks or moments are read from there when they are needed
    if work.finished:
        log.notes.append(f"resumed after {len(work.finished)} finished pieces")
    return room


def _calibrated(
    loaded: LoadedModel,
    recipe: Recipe,
    options: RunOptions,
    text: UserText,
    log: RunLog,
    *,
    planned: bool,
) -> tuple[Recipe, Windows, Room]:
    """The recipe with its windows settled, the windows, and how the run is made to fit them."""
    shape, team, progress = None, options.team, options.progress
    if isinstance(text, Tensor) and text.ndim == 2:
        shape = (text.shape[0], text.shape[1])
    sizes = sizes_of(loaded.model)
    recipe, how = settle(recipe, sizes, loaded.device, longest_window(loaded.model.config), shape)
    if how.reason:
        log.notes.append(calibrated_on(how))
    setting = _setting(loaded, shape or (how.windows, how.window_length), options)
    room = _room(recipe, setting, sizes, team, log, planned=planned)
    logger.info("%s; %s", calibrated_on(how), said(room))
    stages = costs(recipe, setting, sizes, room) if recipe.flow != "learned" else {}
    if text is not None:
        stages.pop("sampling", None)
    if stages and hasattr(progress, "expect"):
        progress.expect(stage_seconds(stages, loaded.device))
    with log.timed("windows"), _told(progress, "sampling" if "sampling" in stages else None):
        windows = gather_windows(
            loaded,
            recipe.calibration,
            text,
            seed=recipe.seed,
            team=team,
            exactly=options.exactly,
        )
    asked = recipe.calibration.window_length or windows.length
    if not isinstance(text, Tensor) and windows.length < asked:
        log.notes.append(
            f"calibrated on windows of {windows.length} tokens instead of {asked}: the model's "
            "positions or the text allow no more"
        )
    _check_shared(windows, team)
    return recipe, windows, room


@contextmanager
def _told(progress: Progress, stage: str | None) -> Iterator[None]:
    """A stage of one step, None for none."""
    if stage is not None:
        progress.start(stage, 1)
    yield
    if stage is not None:
        progress.finish(stage)


def _setting(loaded: LoadedModel, shape: tuple[int, int], options: RunOptions) -> Setting:
    """Where this run works, and on which part of the windows (N, T)."""
    return Setting(
        loaded.device,
        next(loaded.model.parameters()).dtype,
        loaded.stored_dtype,
        loaded.onloader is not None,
        options.streams is not None,
        -(-shape[0] // options.team.size),
        shape[1],
    )


def _room(
    recipe: Recipe, setting: Setting, sizes: Sizes, team: Team, log: RunLog, *, planned: bool
) -> Room:
    """How this run is made to fit; the log is told what that will take.

    Raises:
        InputError: it needs more memory than there is; gives the numbers.
    """
    total = total_bytes(setting.device)
    if total is not None and on_host(setting.device):
        total //= team.size  # each process has the whole model
    batch = recipe.calibration.batch
    if recipe.flow == "learned":  # what training holds is not predicted
        limit = limit_of(total, setting.device)
        return choose_room(recipe, setting, sizes, planned=planned, limit=limit, batch=batch)
    room = fitting_room(recipe, setting, sizes, planned=planned, total=total, batch=batch)
    host, device = peak_parts(recipe, setting, sizes, room, planned=planned)
    log.predicted = sum((host if on_host(setting.device) else device).values())
    return room


def _check_shared(windows: Windows, team: Team) -> None:
    """Every process must have work, and all of them the same windows.

    Raises:
        InputError: fewer windows than processes, or a text that is not the same everywhere.
    """
    if len(windows) < team.size:
        raise InputError(
            f"{len(windows)} calibration windows cannot be shared by {team.size} processes; use "
            "more windows or fewer processes"
        )
    found = team.gather(windows.fingerprint())
    odd = [rank for rank, fingerprint in enumerate(found) if fingerprint != found[0]]
    if odd:
        raise InputError(
            f"rank {odd[0]} has other calibration windows than rank 0: text, tokenizer and "
            "software must be the same on all machines"
        )
