"""LoRA recovery as a step of a run: one stage per factor, on the calibration windows."""

from __future__ import annotations

from dataclasses import asdict

from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.swap import compressed_layers
from spectrim.model.tail import Tail
from spectrim.recipe import LoraRefinement
from spectrim.refine.course import Course, hold_out
from spectrim.refine.lora import LoraTraining, recover
from spectrim.run.job import Job


def recover_network(job: Job, step: LoraRefinement) -> None:
    """Train and merge adapters on one factor after the other, in place.

    Raises:
        MissingExtraError: PEFT is not installed.
        InputError: too few windows for the held-out share.
        NonFiniteError: a stage diverged; its factors are as they were.
    """
    layers = [m for m in compressed_layers(job.model).values() if isinstance(m, LowRankLinear)]
    if not layers:
        job.log.notes.append("lora: no layer was factored, nothing was trained")
        return
    if job.team.size > 1:
        job.log.notes.append(
            f"lora: trained by rank 0 alone, its dropout cannot be shared by {job.team.size} "
            "processes with the draws of one"
        )
    # The others wait; a failure is raised on all of them.
    job.team.total(lambda: _train(job, step, layers) if job.team.leads else 0.0)
    job.team.broadcast_([p.data for layer in layers for p in layer.parameters()], 0)


def _train(job: Job, step: LoraRefinement, layers: list[LowRankLinear]) -> float:
    """All stages, on this process."""
    train, held = hold_out(len(job.ids), step.held_out)
    tail = Tail.find(job.model, [block.name for block in job.anatomy.blocks], job.ids)
    for number, factor in enumerate(step.order):
        training = LoraTraining(
            seed=job.recipe.seed + number,
            micro_batch=job.batch,
            **step.model_dump(exclude={"step", "order", "held_out"}),
        )

        def judged(at: int, nll: float, factor: str = factor) -> None:
            job.progress.advance("lora", f"{factor}, step {at}: loss {nll:.4g}")

        course = Course(train, held, job.ids.shape[1], judged)
        loss = recover(tail, [(layer, factor) for layer in layers], job.ids, course, training)
        job.log.network[f"lora {number + 1} {factor}"] = asdict(loss)
    return 0.0
