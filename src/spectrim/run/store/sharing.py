"""Stored layers from the process that converted them to all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.allocate.plan import PlanEntry
from spectrim.layers.quantized import skeleton
from spectrim.model.anatomy import Target
from spectrim.run.job import Job
from spectrim.run.store.converting import Conversion

__all__ = ["shared_conversions"]


def shared_conversions(
    job: Job,
    targets: Sequence[Target],
    owned: Mapping[str, int],
    converted: dict[str, Conversion],
    entries: Mapping[str, PlanEntry],
    dtype: torch.dtype,
) -> dict[str, Conversion]:
    """The conversions of all targets on every process; collective.

    Args:
        job: the run; its model still holds what was converted.
        targets: some targets, the same everywhere.
        owned: target name -> the rank that converted it.
        converted: this process's own.
        entries: of the plan, for the number formats.
        dtype: of the checkpoint.
    """
    if job.team.size == 1:
        return converted
    by_name = {target.name: target for target in targets}
    facts = {name: [one.storage, one.rank, one.error, one.note] for name, one in converted.items()}
    found = dict(converted)
    for others in job.team.gather(facts):
        for name, (storage, rank, error, note) in others.items():
            if name not in found:
                layer = _room(by_name[name], storage, entries[name].weights, rank, dtype)
                layer = layer.to_empty(device=job.device)
                found[name] = Conversion(layer, storage, rank, error, note)
    for target in targets:
        job.team.broadcast_(_contents(found[target.name].layer), owned[target.name])
    return found


def _contents(layer: nn.Module) -> list[Tensor]:
    """Everything that a layer stores, by name, so that all ranks agree on the order."""
    return [tensor for _, tensor in sorted(layer.state_dict().items())]


def _room(target: Target, storage: str, weights: str, rank: int | None, dtype: torch.dtype) -> Any:
    """A layer of that form on the meta device."""
    shape = (target.out_features, target.in_features)
    return skeleton(storage, weights, shape, rank, bias=target.bias, dtype=dtype)
