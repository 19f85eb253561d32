"""What every pass of a run works on, and what it leaves in the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

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
from spectrim.run.options import RunOptions
from spectrim.run.progress import Progress


@dataclass
class Job:
    """One run: the model being compressed, its calibration windows and its recipe.

    Attributes:
        model: changed in place.
        anatomy: its blocks and targets.
        windows: calibration windows, None for a data-free recipe.
        recipe: resolved.
        device: where blocks are worked on.
        options: how and where it is carried out.
        log: gathers the report.
        outputs: gradient moments of the original model, once a pass has gathered them.
        inputs: second moments of its inputs on all windows, where that pass gathered them too.
        dtype_bytes: of one number as stored, for budgets.
        keeper: brings blocks to hand and keeps what is finished; by default a model in memory, of
            which nothing is kept.
        finished_inputs: of the compressed network, where the pass that cuts it meets them.
        room: how the run is made to fit; by default whatever the recipe's batch needs.
        surveys: how many surveys this run has begun: each keeps its pieces under its own name.
    """

    model: nn.Module
    anatomy: Anatomy
    windows: Windows | None
    recipe: Recipe
    device: torch.device
    options: RunOptions = field(default_factory=RunOptions)
    log: RunLog = field(default_factory=RunLog)
    outputs: Mapping[str, OutputMoments] | None = None
    inputs: Mapping[str, Moments] | None = None
    dtype_bytes: int = 2
    keeper: Keeper = None  # type: ignore[assignment]
    finished_inputs: FinishedInputs = None  # type: ignore[assignment]
    room: Room = None  # type: ignore[assignment]
    surveys: int = 0

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
    def progress(self) -> Progress:
        """Told of every block."""
        return self.options.progress

    @property
    def team(self) -> Team:
        """The processes that share the run; each has the whole model and its own windows."""
        return self.options.team

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
