"""What a survey knows so far, and its pieces in the work folder: one file per surveyed block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from spectrim.allocate.curve import Curve
from spectrim.model.anatomy import Block
from spectrim.run.keeping import Keeper
from spectrim.run.survey.spectra import Spectrum
from spectrim.storage.survey_record import Factors


@dataclass
class Found:
    """What the survey knows so far.

    `spread` holds `a_i C̄ a_iᵀ` per component, the mean squared size of each component's
    intermediate value, for K-FAC losses of any decomposition. `full` holds every component,
    `vectors` any at all; `seen` holds losses on windows held out, at rank 0..r.
    """

    wanted: frozenset[str]
    full: bool
    vectors: bool = True
    curves: list[Curve] = field(default_factory=list)
    factors: dict[str, Factors] = field(default_factory=dict)
    spread: dict[str, Tensor] = field(default_factory=dict)
    losses: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    seen: dict[str, np.ndarray] = field(default_factory=dict)
    stability: dict[str, float] = field(default_factory=dict)
    damping: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def note_loss(found: Found, score: str, name: str, components: Tensor) -> None:
    """The loss at rank k is the sum of what the components from k on cost."""
    values = components.double().clamp(min=0).cpu().numpy()
    by_rank = np.append(np.cumsum(values[::-1])[::-1], 0.0)
    found.losses.setdefault(score, {})[name] = by_rank


def piece_name(stage: str, block: Block) -> str:
    """Key of a surveyed block in the work folder."""
    return f"{stage}-{block.index:03d}"


def note_block(
    keeper: Keeper,
    stage: str,
    block: Block,
    found: Found,
    shapes: Mapping[str, Curve],
    spectra: Mapping[str, Spectrum] | None,
    device: torch.device,
) -> None:
    """Note a block's spectra, or with None what an earlier run has kept of it."""
    if spectra is None:
        _take_piece(keeper, stage, block, found, shapes, device)
    else:
        for target in block.targets:
            _keep(found, shapes[target.name], spectra[target.name])
        _save_piece(keeper, stage, block, found)
    if keeper.onloader is not None:
        # Read again when they are cut: together they can be larger than the model.
        for target in block.targets:
            found.factors.pop(target.name, None)


def _keep(found: Found, bare: Curve, whole: Spectrum) -> None:
    """Note one target's spectrum and as many of its components as are still needed."""
    if found.vectors:
        found.factors[bare.name] = Factors(whole.up, whole.down)
    if whole.spread is not None:
        found.spread[bare.name] = whole.spread
    if whole.damping:
        found.damping[bare.name] = whole.damping
    found.curves.append(
        replace(
            bare,
            energy=whole.energy.double().cpu().numpy(),
            total=whole.total,
            irreducible=whole.irreducible,
            lossless=whole.lossless,
            rounding={key: values.cpu().numpy() for key, values in whole.rounding.items()},
        )
    )


def _save_piece(keeper: Keeper, stage: str, block: Block, found: Found) -> None:
    """Keep what the survey found in a block."""
    curves = {c.name: c for c in found.curves}
    tensors: dict[str, Tensor] = {}
    facts = {}
    for name in (t.name for t in block.targets):
        curve, factors = curves[name], found.factors.get(name)
        assert curve.energy is not None
        tensors[f"{name}/energy"] = torch.from_numpy(np.array(curve.energy))
        if factors is not None:
            tensors |= {f"{name}/up": factors.up, f"{name}/down": factors.down}
        for key, values in (curve.rounding or {}).items():
            tensors[f"{name}/rounding/{key}"] = torch.from_numpy(np.array(values))
        if name in found.spread:
            tensors[f"{name}/spread"] = found.spread[name]
        facts[name] = {
            "total": curve.total,
            "irreducible": curve.irreducible,
            "lossless": curve.lossless,
            "damping": found.damping.get(name),
        }
    keeper.save(piece_name(stage, block), tensors, facts)


def _take_piece(
    keeper: Keeper,
    stage: str,
    block: Block,
    found: Found,
    bare: Mapping[str, Curve],
    device: torch.device,
) -> None:
    """Put what an earlier run found in a block beside the rest."""
    file, facts = keeper.load(piece_name(stage, block))
    for name in (t.name for t in block.targets):
        said = facts[name]
        curve = replace(
            bare[name],
            energy=file.read(f"{name}/energy").numpy(),
            total=said["total"],
            irreducible=said["irreducible"],
            lossless=said["lossless"],
            rounding={
                where.removeprefix(f"{name}/rounding/"): file.read(where).numpy()
                for where in file.entries
                if where.startswith(f"{name}/rounding/")
            },
        )
        found.curves.append(curve)
        if f"{name}/up" in file.entries:
            up, down = (file.read(f"{name}/{part}").to(device) for part in ("up", "down"))
            found.factors[name] = Factors(up, down)
        if f"{name}/spread" in file.entries:
            found.spread[name] = file.read(f"{name}/spread").to(device)
        if said["damping"]:
            found.damping[name] = said["damping"]


def leading(factors: Factors, rank: int) -> Factors:
    """The first `rank` components, in memory of their own."""
    if rank >= factors.rank:
        return factors
    return Factors(factors.up[:, :rank].clone(), factors.down[:rank].clone())


class KeptFactors(Mapping[str, Factors]):
    """Factors of all targets, read from the work folder when one is asked for.

    Args:
        keeper: has the pieces.
        stage: of the survey.
        blocks: all of them.
        device: where the factors are wanted.
        held: target name -> as many leading components of it as are given.
    """

    def __init__(
        self,
        keeper: Keeper,
        stage: str,
        blocks: tuple[Block, ...],
        device: torch.device,
        held: Mapping[str, int] | None = None,
    ):
        self._keeper = keeper
        self._held = held or {}
        self._latest: tuple[str, Factors] | None = None
        self._piece = {t.name: piece_name(stage, b) for b in blocks for t in b.targets}
        self._device = device

    def __getitem__(self, name: str) -> Factors:
        if self._latest is None or self._latest[0] != name:
            file, _ = self._keeper.load(self._piece[name])
            up, down = (file.read(f"{name}/{part}").to(self._device) for part in ("up", "down"))
            self._latest = (name, leading(Factors(up, down), self._held.get(name, up.shape[1])))
        return self._latest[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._piece)

    def __len__(self) -> int:
        return len(self._piece)
