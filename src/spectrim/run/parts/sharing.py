"""Targets shared out over the processes of a run: one decomposes, all get the factors.

Every rank has the same moments, so any of them could do any target; costs decide. Where blocks do
not wait for one another (one-shot flows, surveys) several are taken together until the busiest rank
has little more than its share. A sequential flow cannot look ahead: it shares out the targets of
one group, and a group of one target is one rank's work while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import nn

from spectrim.allocate.plan import Plan
from spectrim.distributed.owners import factorisation_cost, loads
from spectrim.distributed.team import Team
from spectrim.layers.quantized import built, described
from spectrim.layers.swap import is_compressed
from spectrim.model.anatomy import Block, Target
from spectrim.model.onload import give_back
from spectrim.model.weights import is_transposed, read_weight
from spectrim.run.job import Job

BALANCE = 0.9
"""Blocks are taken together until a rank has on average this share of what the busiest one has."""

Make = Callable[[Target, nn.Module], tuple[nn.Module, dict[str, Any]]]
"""A target and its original module -> the layer in its place, and facts for the report."""


def owners_of(team: Team, targets: Sequence[Target], plan: Plan | None = None) -> dict[str, int]:
    """Target name -> the rank that decomposes it; a target that stays dense costs nothing."""
    names = [target.name for target in targets]
    return dict(zip(names, team.owners(_costs(targets, plan)), strict=True))


def _costs(targets: Sequence[Target], plan: Plan | None) -> list[int]:
    return [
        0
        if plan is not None and plan[t.name].rank is None
        else factorisation_cost(t.out_features, t.in_features)
        for t in targets
    ]


def spans(job: Job, plan: Plan | None = None) -> Iterator[list[Block]]:
    """Blocks in order, as many together as it takes to keep all ranks busy.

    One at a time for one process, and out of core, where one is in memory.
    """
    team, waiting = job.team, []
    alone = team.size == 1 or job.keeper.onloader is not None
    for block in job.anatomy.blocks:
        waiting.append(block)
        if alone or _balance(team, waiting, plan) >= BALANCE:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _balance(team: Team, blocks: Sequence[Block], plan: Plan | None) -> float:
    costs = _costs([target for block in blocks for target in block.targets], plan)
    busiest = max(loads(costs, team.owners(costs), team.size))
    return sum(costs) / (team.size * busiest) if busiest else 1.0


def cut_shared(
    job: Job,
    owned: dict[str, int],
    targets: Sequence[Target],
    original: Callable[[Target], nn.Module],
    make: Make,
    place: Callable[[Target, nn.Module], Any],
) -> None:
    """Layers for some targets, each made by its owner and the same on all ranks; collective.

    Args:
        job: the run; its log gets the facts of all targets.
        owned: target name -> the rank that makes it.
        targets: in the order in which they are made.
        original: the module of a target as it is.
        make: makes a layer of the plan's rank, or returns the original where there is none.
        place: puts it where it belongs; one process lets go of every original in its turn.
    """
    team = job.team
    made: dict[str, nn.Module] = {}
    facts: dict[str, dict[str, Any]] = {}
    rooms: dict[str, Any] = {}
    for target in targets:
        if owned[target.name] == team.rank:
            layer, facts[target.name] = make(target, original(target))
            rooms[target.name] = described(layer) if is_compressed(layer) else None
            if team.size == 1:
                place(target, layer)
                if job.keeper.onloader is not None:
                    give_back()
            else:
                made[target.name] = layer
    for found in team.gather(facts):
        for name, those in found.items():
            job.log.target(name, **those)
    if team.size > 1:
        said = {name: room for one in team.gather(rooms) for name, room in one.items()}
        for target in targets:
            whose = owned[target.name]
            place(target, _shared(team, target, original(target), made, said, whose))


def _shared(
    team: Team,
    target: Target,
    original: nn.Module,
    made: dict[str, nn.Module],
    said: dict[str, Any],
    owner: int,
) -> nn.Module:
    """One target's layer on every rank: the original where it was left, or what its owner made."""
    if said[target.name] is None:
        return original
    layer: Any = made.get(target.name)
    if layer is None:
        layer = built(said[target.name]).to_empty(device=read_weight(original).device)
        layer.transposed = is_transposed(original)
        layer.train(original.training)
    team.broadcast_([tensor for _, tensor in sorted(layer.state_dict().items())], owner)
    return layer
