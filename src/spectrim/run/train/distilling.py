"""Distillation as a step of a run: the teacher is recorded before the cut, the rest comes after."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from spectrim.data.mixing import interleave
from spectrim.data.self_text import sample_windows
from spectrim.distributed.pool import Pool
from spectrim.layers.quantized import trained_scales
from spectrim.model.replay import Replay
from spectrim.model.stream import Stream
from spectrim.model.weights import get_module
from spectrim.recipe import DistillRefinement
from spectrim.refine.course import Course, hold_out
from spectrim.refine.distill import Teaching, distill
from spectrim.refine.fitting import FitSettings
from spectrim.refine.masters import frozen
from spectrim.run.job import Job
from spectrim.run.recorded import recorded

SEED_OF_FURTHER_WINDOWS = 1
"""Added to the run's seed, so that they are not the calibration windows sampled once more."""


@dataclass(frozen=True)
class Teacher:
    """What the original network leaves behind for distillation.

    Attributes:
        replay: its block calls and the hidden states that enter block 0.
        hidden: its hidden states after the last block.
        train: indices of the windows to train on, sampled ones included.
        held: indices of the calibration windows that choose the step.
        windows: number of windows on all processes; the streams hold this process's own.
    """

    replay: Replay
    hidden: Stream
    train: Tensor
    held: Tensor
    windows: int


@torch.no_grad()
def record_teacher(job: Job, step: DistillRefinement) -> Teacher:
    """Run all windows through the untouched network once.

    Raises:
        InputError: too few calibration windows for the held-out share.
    """
    assert job.windows is not None  # every recipe with a refinement has windows
    windows, calibration = job.windows, torch.ones(len(job.windows), dtype=torch.bool)
    if step.windows is not None:
        seed = job.recipe.seed + SEED_OF_FURTHER_WINDOWS
        further = sample_windows(
            job.model,
            windows=step.windows,
            window_length=windows.length,
            seed=seed,
            team=job.team,
        )
        mixed = interleave([windows, further])
        calibration = mixed.source_index < len(windows.sources)
        windows = mixed
        job.log.notes.append(
            f"distillation: {step.windows} further windows sampled from the original model, "
            f"seed {seed}, fingerprint {further.fingerprint()[:16]}"
        )
    _, held = hold_out(int(calibration.sum()), step.held_out)
    held = calibration.nonzero().flatten()[held]
    train = torch.ones(len(windows), dtype=torch.bool)
    train[held] = False
    replay = recorded(job, windows.ids)
    hidden = replay.stream.duplicate(job.options.streams)
    for block in job.anatomy.blocks:
        replay.advance(block.index, hidden, job.batch, job.device)
    return Teacher(replay, hidden, train.nonzero().flatten(), held, len(windows))


def distill_network(job: Job, step: DistillRefinement, teacher: Teacher) -> str:
    """Train all blocks of the compressed network in place; returns a note for the progress line.

    Raises:
        NonFiniteError: the training diverged; the blocks are as they were.
    """
    replay = teacher.replay
    modules = [get_module(job.model, block.name) for block in job.anatomy.blocks]
    wide = torch.promote_types(teacher.hidden.dtype, torch.float32)

    pool = Pool(job.team, teacher.windows, (replay.stream, teacher.hidden))
    entering, leaving = pool.states

    def student(rows: Tensor) -> Tensor:
        hidden = entering.read(rows, job.device).to(wide)
        for index, module in enumerate(modules):
            hidden = replay.unchecked(index, module, hidden)
        # Norm and output projection keep their dtype, while the blocks have fp32 masters.
        return hidden.to(teacher.hidden.dtype)

    settings = FitSettings(
        steps=step.steps,
        judge_every=step.evaluate_every,
        batch=step.batch,
        micro_batch=job.batch,
        learning_rate=step.learning_rate,
        final_learning_rate=0.0,
        weight_decay=step.weight_decay,
        warmup=step.warmup,
        clip=step.clip,
        relative=step.relative,
        seed=job.recipe.seed,
    )

    def judged(at: int, kl: float) -> None:
        job.progress.advance("distill", f"step {at}: KL {kl:.4g}")

    course = Course(teacher.train, teacher.held, teacher.hidden.shape[1], judged, pool)
    teaching = Teaching(student, leaving, replay.tail)
    with ExitStack() as stack:
        stack.enter_context(trained_scales(modules))
        parameters = [p for module in modules for p in module.parameters()]
        trained = {id(p) for p in parameters}
        others = [p for p in job.model.parameters() if id(p) not in trained]
        stack.enter_context(frozen(others))
        loss = distill(parameters, teaching, course, settings, device=job.device)
    job.log.network["distill"] = asdict(loss)
    return f"KL {loss.before:.4g} -> {loss.after:.4g}"
