"""One target's spectrum and factors, found by the process that owns the target, known to all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from spectrim.decompose.decomposition import Decomposition
from spectrim.distributed.team import Team
from spectrim.model.anatomy import Target
from spectrim.moments.moments import Moments


@dataclass(frozen=True)
class Spectrum:
    """What a survey keeps of a decomposition.

    Attributes:
        up: leading components, (out, k) fp32.
        down: leading components, (k, in) fp32.
        energy: of all components, (r,) fp64.
        spread: `a_i C̄ a_iᵀ` of every component, the mean squared size of its intermediate value,
            (r,) fp64, or None where it is not wanted or there are no inputs.
        total: the objective at rank 0.
        irreducible: the objective at full rank.
        damping: relative.
        lossless: see `Curve`.
        rounding: what forms would round away, see `rounding_losses`.
    """

    up: Tensor
    down: Tensor
    energy: Tensor
    spread: Tensor | None
    total: float
    irreducible: float
    damping: float
    lossless: int | None = None
    rounding: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def parts(self) -> list[Tensor]:
        """All of its tensors, in an order that depends on their names only."""
        spread = [] if self.spread is None else [self.spread]
        rounding = [self.rounding[key] for key in sorted(self.rounding)]
        factors = [self.up, self.down] if self.up.numel() else []
        return [self.energy, *factors, *spread, *rounding]


def spectrum_of(
    whole: Decomposition,
    rank: int,
    moments: Moments | None,
    *,
    spread: bool,
    lossless: int | None,
    rounding: Mapping[str, Tensor] | None = None,
) -> Spectrum:
    """The first `rank` components of a decomposition, cast to fp32, and all of its numbers."""
    up, down = whole.up[:, :rank], whole.down[:rank]
    sizes = None
    if spread and moments is not None and moments.C is not None:
        means = moments.C.to(whole.down) / moments.tokens
        sizes = ((whole.down @ means) * whole.down).sum(1).double()
    return Spectrum(
        up=up.float().clone(),
        down=down.float().clone(),
        energy=whole.energy.double(),
        spread=sizes,
        total=whole.total,
        irreducible=whole.irreducible,
        damping=whole.damping,
        lossless=lossless,
        rounding=rounding or {},
    )


def shared_spectra(
    team: Team,
    targets: list[Target],
    owned: Mapping[str, int],
    find: Callable[[Target], Spectrum],
    device: torch.device,
) -> dict[str, Spectrum]:
    """Every target's spectrum on every process, each found by its owner; collective.

    Args:
        team: the processes.
        targets: some targets, the same everywhere.
        owned: target name -> the rank that finds its spectrum.
        find: called for the targets of this process only.
        device: where spectra of other processes arrive.
    """
    found = {t.name: find(t) for t in targets if owned[t.name] == team.rank}
    if team.size == 1:
        return found
    for facts in team.gather({name: _facts(one) for name, one in found.items()}):
        found |= {n: _room(f, device) for n, f in facts.items() if n not in found}
    for target in targets:
        team.broadcast_(found[target.name].parts, owned[target.name])
    return found


def _facts(one: Spectrum) -> dict:
    """What the others need to make room for a spectrum; JSON-ready."""
    return {
        "up": list(one.up.shape),
        "down": list(one.down.shape),
        "components": len(one.energy),
        "spread": one.spread is not None,
        "numbers": [one.total, one.irreducible, one.damping],
        "lossless": one.lossless,
        "rounding": {key: len(values) for key, values in one.rounding.items()},
    }


def _room(facts: dict, device: torch.device) -> Spectrum:
    def numbers(count: int = facts["components"]) -> Tensor:
        return torch.empty(count, dtype=torch.float64, device=device)

    total, irreducible, damping = facts["numbers"]
    return Spectrum(
        up=torch.empty(facts["up"], device=device, dtype=torch.float32),
        down=torch.empty(facts["down"], device=device, dtype=torch.float32),
        energy=numbers(),
        spread=numbers() if facts["spread"] else None,
        total=total,
        irreducible=irreducible,
        damping=damping,
        lossless=facts["lossless"],
        rounding={key: numbers(count) for key, count in facts["rounding"].items()},
    )
