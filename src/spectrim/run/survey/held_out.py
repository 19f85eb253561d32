"""Losses seen on windows that were held out while the moments were gathered.

A decomposition keeps the directions that its own calibration tokens favour, and its energies are
means of inputs times means of gradients: they say too little of what other tokens lose, and nothing
of tokens whose inputs and gradients are large at the same time. A component `u_i a_i` changes the
loss of a held-out token t, with input x and output gradient g, by `s_ti = (g_t · u_i)(a_i · x_t)`;
dropping all components from rank k on then costs, to second order,

    E_t [l_t / (1 + l_t)],   l_t = ½ (Σ_{i >= k} s_ti)²

nats per token, levelled off where the quadratic form runs away: for all ranks of all targets from
one pass, block by block, over a few windows.
Afterwards the moments of the held-out windows are added to the others, so that what is cut in the
end has seen them all.

What is seen is few tokens' and takes each token by itself; what energies predict is all tokens' and
takes inputs and gradients apart. Both are off by factors, so plans go by the geometric mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spectrim.decompose import OBJECTIVES
from spectrim.model.anatomy import Block, Target
from spectrim.model.weights import get_module, read_weight
from spectrim.moments.folded import Folded
from spectrim.moments.gradient_record import GradientPass
from spectrim.moments.moments import Moments, OutputMoments, Record
from spectrim.recipe import Decompose
from spectrim.run.job import Job
from spectrim.run.kept_moments import ByGroup, KeptMoments, flattened, restored
from spectrim.run.parts.cutting import decompose_target
from spectrim.run.parts.sharing import owners_of
from spectrim.run.survey.backward import pass_by_block
from spectrim.run.survey.spectra import Spectrum, shared_spectra, spectrum_of

STAGE = "held out"


@dataclass
class Seen:
    """What the held-out windows have shown.

    Attributes:
        outputs: gradient moments of all windows.
        inputs: input moments of all windows.
        losses: target -> loss at rank 0..r, nats per token, (r + 1,).
    """

    outputs: Mapping[str, OutputMoments]
    inputs: Mapping[str, Moments]
    losses: dict[str, np.ndarray]


def windows_held_out(job: Job, choice: Decompose) -> int:
    """How many of the run's windows are held out; says why where the recipe's wish is not met."""
    share, count = job.recipe.allocate.held_out, len(job.ids)
    if not share:
        return 0
    if choice.objective != "kfac":
        job.log.notes.append(
            f"no windows were held out: losses are seen on them for objectives of both sides, and "
            f"this is {choice.objective}"
        )
        return 0
    if count == 1:
        job.log.notes.append("the only window cannot be held out: losses are those it predicts")
        return 0
    return min(max(1, round(share * count)), count - 1)


def see_losses(
    job: Job,
    ids: Tensor,
    choice: Decompose,
    stage: str,
    outputs: Mapping[str, OutputMoments],
    inputs: Mapping[str, Moments],
) -> Seen:
    """The losses of all targets on the windows held out, and the moments of all windows.

    Args:
        job: the run.
        ids: the windows held out.
        choice: objective and clipping.
        stage: under which blocks are kept; what an earlier run has seen is taken from there.
        outputs: gradient moments of the other windows; in memory they become those of all.
        inputs: input moments of the other windows, likewise.

    Raises:
        NonFiniteError: a gradient is not finite; names the target.
    """
    blocks, keeper = job.anatomy.blocks, job.keeper
    names = {block: f"{stage}-held-out-{block.index:03d}" for block in blocks}
    seen = Seen(outputs, inputs, {})
    if not all(keeper.has(name) for name in names.values()):
        for block, found in _passes(job, ids, choice, outputs, inputs):
            losses = {name: _by_rank(scores.tails) for name, scores in found.scores.items()}
            sums = {"out": _merged(outputs, found.outputs), "in": _merged(inputs, found.inputs)}
            tensors, numbers = flattened(sums)
            kept = {f"loss/{name}/by rank": values for name, values in losses.items()}
            keeper.save(names[block], tensors | kept, numbers)
            seen.losses |= {name: values.numpy() for name, values in losses.items()}
            _take(seen, sums["out"], sums["in"])
    else:
        for name in names.values():
            file, numbers = keeper.load(name)
            for where in file.entries:
                if where.startswith("loss/"):
                    seen.losses[where.split("/")[1]] = file.read(where).numpy()
            if isinstance(outputs, Folded):
                of = restored(file, numbers, "out", OutputMoments, job.device)
                _take(seen, of, restored(file, numbers, "in", Moments, job.device))
    if not isinstance(outputs, Folded):
        seen.outputs = KeptMoments(keeper.load, job.device, names, "out", OutputMoments)
        seen.inputs = KeptMoments(keeper.load, job.device, names, "in", Moments)
    return seen


def weighed(predicted: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """The geometric mean of predicted losses at rank 0..r and of those seen, (r + 1,).

    Components that were not there without the windows held out count as seen to cost nothing.
    """
    room = np.zeros_like(predicted)
    count = min(len(room), len(seen))
    room[:count] = seen[:count]
    return np.sqrt(predicted * room)


def _by_rank(tails: Tensor | None) -> Tensor:
    """Losses at rank 0..r, fp64: no rank loses less than a larger one."""
    assert tails is not None
    falling = tails.flip(0).cummax(0).values.flip(0)
    return torch.cat([falling, falling.new_zeros(1)]).cpu()


def _merged(all_of: Mapping[str, Record], found: Folded[Record]) -> Folded[Record]:
    """The sums of a block's records over both sets of windows."""
    merged = found.only(found)
    merged.merge({name: all_of[name] for name in found})
    return merged


def _take(seen: Seen, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """Put a block's sums in the place of those without the held-out windows, if in memory."""
    if isinstance(seen.outputs, Folded) and isinstance(seen.inputs, Folded):
        seen.outputs.take(outputs)
        seen.inputs.take(inputs)


def _passes(
    job: Job,
    ids: Tensor,
    choice: Decompose,
    outputs: Mapping[str, OutputMoments],
    inputs: Mapping[str, Moments],
) -> Iterator[tuple[Block, GradientPass]]:
    """The held-out windows backwards through the network, block by block, with its components."""
    blocks = {target.name: block for block in job.anatomy.blocks for target in block.targets}
    spectra: dict[str, Spectrum] = {}

    def components(name: str) -> tuple[Tensor, Tensor]:
        # Asked for when a block's turn comes: all of its targets are shared out together.
        if name not in spectra:
            spectra.clear()
            spectra.update(_decomposed(job, choice, blocks[name], outputs, inputs))
        one = spectra.pop(name)
        return one.up, one.down

    yield from pass_by_block(
        job,
        ids,
        STAGE,
        needs=OBJECTIVES[choice.objective].outputs | {"tails"},
        input_needs=frozenset({"C"}),
        factors=components,
        clip=choice.clip,
        batch=job.batch,
        team=job.team,
    )


def _decomposed(
    job: Job,
    choice: Decompose,
    block: Block,
    outputs: Mapping[str, OutputMoments],
    inputs: Mapping[str, Moments],
) -> dict[str, Spectrum]:
    """All components of a block's targets, made without the windows held out; collective."""
    moments = ByGroup(block, inputs)

    def find(target: Target) -> Spectrum:
        W = read_weight(get_module(job.model, target.name))
        of, out = moments[target.group], outputs[target.name]
        whole = decompose_target(target, W, choice, of, out)
        return spectrum_of(whole, whole.rank, of, spread=False, lossless=None)

    owned = owners_of(job.team, block.targets)
    with job.keeper.at_hand(block):
        return shared_spectra(job.team, list(block.targets), owned, find, job.device)
