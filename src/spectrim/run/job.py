"""What every pass of a run works on, and what it leaves in the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from spectrim.data.windows import Windows
from spectrim.distributed.team import Team
from spectrim.model.anatomy import Anatomy
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.recipe import Recipe
from spectrim.run.footprint import Room
from spectrim.run.keeping import Keeper
from spectrim.run.kept_moments import FinishedInputs
from spectrim.run.log import RunLog

__all__ = ["Job", "Progress", "RunLog", "Silent"]


class Progress(Protocol):
    """How the library tells a command line where it is."""

    def expect(self, seconds: Mapping[str, float]) -> None:
        """The stages of the run are predicted to take so long; may be left out."""

    def start(self, stage: str, total: int) -> None:
        """A stage of `total` steps begins."""

    def advance(self, stage: str, note: str = "") -> None:
        """One step of the stage is done."""

    def finish(self, stage: str) -> None:
        """The stage is over."""


class Silent:
    """Progress that shows nothing."""

    def expect(self, seconds: Mapping[str, float]) -> None:
        """Show nothing."""

    def start(self, stage: str, total: int) -> None:
        """Show nothing."""

    def advance(self, stage: str, note: str = "") -> None:
        """Show nothing."""

    def finish(self, stage: str) -> None:
        """Show nothing."""


@dataclass
class Job:
    """One run: the model being compressed, its calibration windows and its recipe.

    Attributes:
        model: changed in place.
        anatomy: its blocks and targets.
        windows: calibration windows, None for a data-free recipe.
        recipe: resolved.
        device: where blocks are worked on.
        progress: told of every block.
        log: gathers the report.
        offload_streams: folder for memory-mapped streams, None for memory.
        on_failure: `error` or `keep-unrefined`.
        outputs: gradient moments of the original model, once a pass has gathered them.
        inputs: second moments of its inputs on all windows, where that pass gathered them too.
        dtype_bytes: of one number as stored, for budgets.
        keeper: brings blocks to hand and keeps what is finished; by default a model in memory, of
            which nothing is kept.
        finished_inputs: of the compressed network, where the pass that cuts it meets them.
        room: how the run is made to fit; by default whatever the recipe's batch needs.
        surveys: how many surveys this run has begun: each keeps its pieces under its own name.
        team: the processes that share the run; each has the whole model and its own windows.
    """

    model: nn.Module
    anatomy: Anatomy
    windows: Windows | None
    recipe: Recipe
    device: torch.device
    progress: Progress = field(default_factory=Silent)
    log: RunLog = field(default_factory=RunLog)
    offload_streams: Path | None = None
    on_failure: str = "error"
    outputs: Mapping[str, OutputMoments] | None = None
    inputs: Mapping[str, Moments] | None = None
    dtype_bytes: int = 2
    keeper: Keeper = None  # type: ignore[assignment]
    finished_inputs: FinishedInputs = None  # type: ignore[assignment]
    room: Room = None  # type: ignore[assignment]
    surveys: int = 0
    team: Team = field(default_factory=Team)

    def __post_init__(self) -> None:
        if self.keeper is None:
            self.keeper = Keeper(self.model, self.log)
        if self.room is None:
            batch = self.recipe.calibration.batch or 8
            apart = self.keeper.onloader is not None
            self.room = Room(batch, batch, "by block" if apart else "whole")
        if self.finished_inputs is None:
            self.finished_inputs = FinishedInputs(self.keeper, self.device)

    @property
    def ids(self) -> Tensor:
        """Token ids of the calibration windows, (N, T)."""
        if self.windows is None:
            raise ValueError(f"the recipe {self.recipe.name!r} was run without windows")
        return self.windows.ids

    @property
    def batch(self) -> int:
        """Windows per forward pass."""
        return self.room.batch
