"""Put gates on a model: decompose every target of the original, keep its last hidden states.

One pass over the original network serves both: moments on the way, and at the end the stream
holds what the teacher's distribution follows from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectrim.allocate.curve import shape_curves
from spectrim.allocate.ladder import Limits
from spectrim.decompose import OBJECTIVES
from spectrim.devices import on_host
from spectrim.errors import RecipeError
from spectrim.learn.gated import GatedLinear, Lora
from spectrim.learn.lessons import Lessons, seeded
from spectrim.learn.pruning import Gated
from spectrim.model.forward import evaluating
from spectrim.model.recompute import recomputed
from spectrim.model.replay import Replay
from spectrim.model.weights import get_module, read_bias, read_weight, replace_module
from spectrim.refine.masters import frozen
from spectrim.run.job import Job
from spectrim.run.parts.cutting import decompose_target
from spectrim.run.parts.passing import block_moments
from spectrim.run.planning import plan_limits
from spectrim.run.recorded import recorded
from spectrim.run.survey.backward import output_moments


@dataclass(frozen=True)
class Adapters:
    """LoRA on every target: rank (0 for none), alpha, dropout."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0


@torch.no_grad()
def build_gated(job: Job, *, adapters: Adapters, deviation: bool = False) -> tuple[Gated, Replay]:
    """Gated layers for all targets, not yet in the model, and the replay with its last states.

    Raises:
        RecipeError: the objective needs shifted inputs, which a one-pass basis has not.
    """
    choice = job.recipe.decompose
    objective = OBJECTIVES[choice.objective]
    if objective.inputs != objective.original:
        raise RecipeError(
            f"recipe {job.recipe.name!r}: gates cannot be put on the objective "
            f"{choice.objective!r}, which changes while the model shrinks; use whitened or plain"
        )
    outputs = output_moments(job)
    layers: dict[str, GatedLinear] = {}
    stage = "components"
    job.progress.start(stage, len(job.anatomy.blocks))
    with job.log.timed(stage), evaluating(job.model):
        replay = recorded(job, job.ids)
        for block in job.anatomy.blocks:
            moments = block_moments(job, replay, block, objective.original)
            for group in block.groups:
                for target in group.targets:
                    original = get_module(job.model, target.name)
                    W = read_weight(original)
                    found = decompose_target(
                        target, W, choice, moments[group.index], outputs.get(target.name)
                    )
                    index = len(layers)
                    layers[target.name] = GatedLinear(
                        original,
                        found.up.to(W),
                        found.down.to(W),
                        read_bias(original),
                        lora=_lora(W, adapters, job.recipe.seed, index),
                        deviation=deviation and target.bias,
                    ).to(W.device)
            job.progress.advance(stage, block.name)
    job.progress.finish(stage)
    limits: Limits = plan_limits(job.recipe, job.dtype_bytes)
    gated = Gated(layers, shape_curves(job.anatomy), limits, adapters=adapters.rank)
    return gated, replay


def _lora(W: Tensor, adapters: Adapters, seed: int, index: int) -> Lora | None:
    if adapters.rank == 0:
        return None
    scale = adapters.alpha / adapters.rank
    rows, columns = W.shape
    lora = Lora(rows, columns, adapters.rank, scale=scale, dropout=adapters.dropout)
    lora.initialize(seeded(seed, index))
    return lora


@contextmanager
def gates_in_place(job: Job, gated: Gated, *, recompute: bool = False) -> Iterator[None]:
    """The model computes with the gated layers and only they are trained; undone at the end.

    With `recompute` blocks do not keep their activations for the backward pass.
    """
    model: nn.Module = job.model
    others = list(model.parameters())
    try:
        for name, layer in gated.layers.items():
            replace_module(model, name, layer)
        blocks = [get_module(model, block.name) for block in job.anatomy.blocks]
        with frozen(others), recomputed(blocks, on=recompute):
            yield
    finally:
        for name, layer in gated.layers.items():
            replace_module(model, name, layer.original)


def lessons_for(job: Job, replay: Replay, *, batch: int, accumulate: int, teacher: bool) -> Lessons:
    """What to train on: the calibration windows, the model itself, the original's last states."""
    return Lessons(
        ids=job.ids,
        student=replay.tail.states,
        teacher=(lambda rows: replay.stream.read(rows, job.device)) if teacher else None,
        tail=replay.tail,
        device=job.device,
        batch=batch,
        accumulate=accumulate,
        seed=job.recipe.seed,
        autocast=not on_host(job.device),
    )
