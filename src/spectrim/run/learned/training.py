"""What the trainings of both learned recipes share: settings, checkpoints, progress, the cut."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.swap import swap_in
from spectrim.learn.checkpoint import Checkpoint
from spectrim.learn.gated import GatedLinear
from spectrim.model.recompute import is_large
from spectrim.model.weights import read_weight
from spectrim.recipe import AcipLearning, SocoLearning
from spectrim.run.identity import flat_recipe
from spectrim.run.job import Job
from spectrim.storage.elastic import Base


def recomputes(job: Job, section: AcipLearning | SocoLearning) -> bool:
    """Whether blocks recompute their activations in the backward pass."""
    if section.recompute == "auto":
        return is_large(job.model)
    return section.recompute == "always"


def put_factors(
    job: Job, name: str, layer: GatedLinear, up: Tensor, down: Tensor, bias: Tensor | None
) -> None:
    """A plain low-rank layer in the place of a gated one, cast to the model's dtype here."""
    W = read_weight(layer.original)
    small = LowRankLinear.from_factors(up, down, bias, dtype=W.dtype, device=W.device)
    swap_in(job.model, name, small)


def settings_of(kind: type, section: Any, **more: Any) -> Any:
    """The fields of a section that a settings class has, plus what the run knows."""
    names = {f.name for f in fields(kind)} - more.keys()
    return kind(**{name: getattr(section, name) for name in names}, **more)


def checkpoint_of(job: Job, base: Base | None, work: Path | None, every: int) -> Checkpoint | None:
    """The checkpoint in a work folder; it belongs to this recipe, model and these windows."""
    if work is None:
        return None
    assert job.windows is not None
    identity = flat_recipe(job.recipe)
    identity["windows"] = job.windows.fingerprint()
    identity["model"] = "" if base is None else base.identity
    return Checkpoint(Path(work), identity, every)


class StepReporter:
    """Steps of the trainings as stages of the run's progress."""

    def __init__(self, job: Job):
        self.job = job
        self.stage = ""
        self.done = 0

    def __call__(self, stage: str, step: int, total: int, note: str) -> None:
        """Bring the stage's bar to `step`."""
        if stage != self.stage:
            self.close()
            self.stage, self.done = stage, 0
            self.job.progress.start(stage, total)
        for _ in range(self.done, min(step, total)):
            self.job.progress.advance(stage, note)
        self.done = max(self.done, step)

    def close(self) -> None:
        """End the stage."""
        if self.stage:
            self.job.progress.finish(self.stage)
        self.stage = ""
