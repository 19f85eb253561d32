"""Stored layers from the process that converted them to all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from spectrim.layers.quantized import built, described
from spectrim.model.anatomy import Target
from spectrim.run.job import Job
from spectrim.run.store.converting import Conversion


def shared_conversions(
    job: Job,
    targets: Sequence[Target],
    owned: Mapping[str, int],
    converted: dict[str, Conversion],
) -> dict[str, Conversion]:
    """The conversions of all targets on every process; collective.

    Args:
        job: the run; its model still holds what was converted.
        targets: some targets, the same everywhere.
        owned: target name -> the rank that converted it.
        converted: this process's own.
    """
    if job.team.size == 1:
        return converted
    facts = {name: [described(x.layer), x.error, x.note] for name, x in converted.items()}
    found = dict(converted)
    for others in job.team.gather(facts):
        for name, (said, error, note) in others.items():
            if name not in found:
                layer = built(said).to_empty(device=job.device)
                found[name] = Conversion(layer, said["storage"], said["rank"], error, note)
    for target in targets:
        job.team.broadcast_(_contents(found[target.name].layer), owned[target.name])
    return found


def _contents(layer: nn.Module) -> list[Tensor]:
    """Everything that a layer stores, by name, so that all ranks agree on the order."""
    return [tensor for _, tensor in sorted(layer.state_dict().items())]
