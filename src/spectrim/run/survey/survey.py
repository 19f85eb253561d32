"""The survey: spectra and scores of every target of the original model, once, for every size.

It costs one forward pass over the windows and one decomposition per target, block by block; where
scores are wanted, one backward pass over some of the windows that serves all targets at once.
Objectives of output gradients (fisher, kfac) take their moments from one backward pass over all
windows, which collects the input moments on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import closing
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from spectrim.allocate.curve import shape_curves
from spectrim.allocate.ladder import Limits, largest_rank
from spectrim.allocate.sensitivity import candidate_ranks
from spectrim.allocate.yardstick import judged_forms
from spectrim.decompose import OBJECTIVES
from spectrim.linalg.exact_rank import exact_rank
from spectrim.model.anatomy import Block, Target
from spectrim.model.weights import get_module, read_weight
from spectrim.moments.experts import BlockMoments
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.recipe import Decompose
from spectrim.run.job import Job
from spectrim.run.kept_moments import ByGroup
from spectrim.run.parts.cutting import decompose_target
from spectrim.run.parts.passing import advance, block_moments
from spectrim.run.parts.sharing import owners_of, spans
from spectrim.run.planning import TABLE
from spectrim.run.recorded import recorded
from spectrim.run.survey.backward import gathered_moments
from spectrim.run.survey.held_out import see_losses, weighed, windows_held_out
from spectrim.run.survey.pieces import (
    Found,
    KeptFactors,
    leading,
    note_block,
    note_loss,
    piece_name,
)
from spectrim.run.survey.probing import measured_perplexities
from spectrim.run.survey.rounding import rounding_losses
from spectrim.run.survey.scoring import score_components, with_references
from spectrim.run.survey.spectra import Spectrum, shared_spectra, spectrum_of
from spectrim.storage.survey_record import Factors, Survey

COMPONENT_SCORES = frozenset({"first_order", "second_order", "kfac"})
_UNSHIFTED = {"shifted": "whitened", "anchored": "whitened", "anchored_kfac": "kfac"}


def surveyed_choice(choice: Decompose) -> Decompose:
    """The objective to survey for: on the original stream nothing is shifted yet.

    With `x' = x` the shift-aware and the anchored objective are the input-aware one, and the
    anchored double-sided one is the double-sided one.
    """
    unshifted = _UNSHIFTED.get(choice.objective, choice.objective)
    return choice.model_copy(update={"objective": unshifted})


def make_survey(
    job: Job,
    *,
    scores: Collection[str] | None = None,
    weight_of: Callable[[Target], Tensor] | None = None,
    complete: bool = False,
    vectors: bool = True,
) -> Survey:
    """Survey the model as it is now; nothing in it changes.

    Args:
        job: the run; its recipe says objective, gradient windows and, without `scores`, the rule
            that the scores are for.
        scores: of `first_order`, `second_order`, `kfac`, `measured`, and `table` for ASVD's
            sensitivities.
        weight_of: exact weights to decompose where the modules hold rounded ones.
        complete: hold every component, also those that no plan can use.
        vectors: False where ranks are all that is wanted: no factors are computed unless a score
            needs them, which costs a third.

    Returns:
        A survey without key, with factors up to the largest rank that a plan can use.

    Raises:
        SpectrimError: statistics or scores that are not finite; names the target.
    """
    wanted = frozenset(job.recipe.allocate.needed_scores if scores is None else scores)
    choice = surveyed_choice(job.recipe.decompose)
    # Energies of the objective kfac are K-FAC losses already: no component is scored for them.
    scored = wanted & COMPONENT_SCORES - ({"kfac"} if choice.objective == "kfac" else set())
    vectors = vectors or bool(scored or wanted & {"measured", TABLE})
    found = Found(wanted, full=bool(scored), vectors=vectors)
    asked = job.recipe.decompose.objective
    if choice.objective != asked:
        found.notes.append(
            f"the survey used the objective {choice.objective}, which is {asked} while nothing is "
            "shifted"
        )
    stage = f"survey{job.surveys}"
    job.surveys += 1
    with job.log.timed("survey"):
        _decompose_all(job, stage, choice, found, weight_of)
    factors = _factors(job, stage, found) if vectors else found.factors
    if scored:
        with job.log.timed("scores"):
            score_components(job, choice, found, factors)
    limits = _limits(job)
    if vectors and not complete:
        held = {c.name: min(largest_rank(c.shape, limits), c.rank) for c in found.curves}
        factors = _cut_to(job, stage, found, held)
    if "measured" in wanted:
        found.curves = with_references(job, found)
    table: dict[tuple[str, float], float] = {}
    if TABLE in wanted:
        candidates = {c.name: candidate_ranks(c, limits) for c in found.curves}
        table = measured_perplexities(job, found.factors, candidates)
    return _as_survey(job, found, table, factors if vectors else None)


def _as_survey(
    job: Job,
    found: Found,
    table: Mapping[tuple[str, float], float],
    factors: Mapping[str, Factors] | None,
) -> Survey:
    return Survey(
        key=None,
        model_name="",
        curves=tuple(found.curves),
        losses=found.losses,
        dtype_bytes=job.dtype_bytes,
        other_bytes=0,
        recipe=job.recipe.model_dump(mode="json"),
        facts=_facts(job, found),
        table=table,
        notes=tuple(found.notes),
        factors=factors,
    )


def _factors(
    job: Job, stage: str, found: Found, held: Mapping[str, int] | None = None
) -> Mapping[str, Factors]:
    """What was decomposed: in memory, or in the pieces of a run out of core."""
    if job.keeper.onloader is None:
        return found.factors
    return KeptFactors(job.keeper, stage, job.anatomy.blocks, job.device, held)


def _cut_to(job: Job, stage: str, found: Found, held: Mapping[str, int]) -> Mapping[str, Factors]:
    """Components up to the largest ranks that a plan can use."""
    for name in found.factors:
        found.factors[name] = leading(found.factors[name], held[name])
    return _factors(job, stage, found, held)


def _limits(job: Job) -> Limits:
    """The widest limits that plans from this survey may have."""
    return Limits(
        dtype_bytes=job.dtype_bytes,
        storage=job.recipe.storage.kind,
        weights=job.recipe.storage.weights,
    )


def moments_by_block(
    job: Job,
    stage: str,
    choice: Decompose,
    input_needs: frozenset[str],
    found: Found | None = None,
) -> Generator[tuple[Block, Mapping[int, Moments], Mapping[str, OutputMoments]], None, None]:
    """Every block, at hand, with its groups' input moments and its targets' output moments.

    Blocks that were surveyed earlier come without moments; a stream only passes them.

    Args:
        job: the run; its model stays as it is.
        stage: under which blocks are kept when they are surveyed.
        choice: objective and clipping.
        input_needs: statistics of inputs to collect.
        found: a survey, which gets the losses of the windows that are held out, if any are.
    """
    blocks = job.anatomy.blocks
    finished = [job.keeper.has(piece_name(stage, block)) for block in blocks]
    outputs: Mapping[str, OutputMoments] = {}
    inputs: Mapping[str, Moments] = {}
    replay = None
    held = 0 if found is None or "kfac" not in found.wanted else windows_held_out(job, choice)
    if OBJECTIVES[choice.objective].outputs:
        gathered = {"ids": job.ids[held:], "input_needs": input_needs, "stage": stage}
        outputs, inputs = gathered_moments(job, choice, **gathered)
        if found is not None and held:
            seen = see_losses(job, job.ids[:held], choice, stage, outputs, inputs)
            outputs, inputs = seen.outputs, seen.inputs
            found.seen = seen.losses
            found.notes.append(f"losses were seen on {held} of {len(job.ids)} windows, held out")
        job.outputs = outputs
        job.inputs = inputs if "C" in input_needs else None
    elif input_needs and not all(finished):
        replay = recorded(job, job.ids)
    for block, done in zip(blocks, finished, strict=True):
        with job.keeper.at_hand(block):
            moments: Mapping[int, Moments] = {}
            if done and replay is not None:
                advance(job, replay, block)
            elif replay is not None:
                moments = block_moments(job, replay, block, input_needs)
            elif not done:
                moments = ByGroup(block, inputs)
            yield block, moments, outputs


@torch.no_grad()
def _decompose_all(
    job: Job,
    stage: str,
    choice: Decompose,
    found: Found,
    weight_of: Callable[[Target], Tensor] | None,
) -> None:
    """Decompose every target, one block's moments at a time."""
    limits = _limits(job)
    shapes = {c.name: c for c in shape_curves(job.anatomy)}
    needs: frozenset[str] = OBJECTIVES[choice.objective].original
    if "kfac" in found.wanted:
        needs |= {"C"}
    # Losses of rounding are in nats, which only this objective's energies are.
    keep = None if found.vectors else job.recipe.keep
    forms = judged_forms(limits, [*shapes.values()], keep) if choice.objective == "kfac" else ()
    job.progress.start("survey", len(job.anatomy.blocks))
    with closing(moments_by_block(job, stage, choice, needs, found)) as gathered:
        for span in spans(job):
            owned = owners_of(job.team, [target for block in span for target in block.targets])
            moments: dict[str, Callable[[], Moments | None]] = {}
            outputs: Mapping[str, OutputMoments] = {}
            for block, inputs, outputs_of_block in islice(gathered, len(span)):
                # Others' moments are let go at once.
                mine = [t for t in block.targets if owned[t.name] == job.team.rank]
                if isinstance(inputs, BlockMoments):
                    inputs.keep({t.group for t in mine})
                moments |= {t.name: partial(inputs.get, t.group) for t in mine}
                outputs = outputs_of_block

            def find(target: Target, moments=moments, outputs=outputs) -> Spectrum:
                module = get_module(job.model, target.name)
                W = read_weight(module) if weight_of is None else weight_of(target)
                of = moments[target.name]()
                out = outputs.get(target.name)
                rank = None if found.vectors else 0
                whole = decompose_target(target, W, choice, of, out, rank=rank)
                full = whole.rank if found.full else largest_rank(shapes[target.name].shape, limits)
                lost: dict[str, Tensor] = {}
                if forms and of is not None and out is not None:
                    lost = rounding_losses(target.name, W, whole, of, out, choice, forms)
                spread = "kfac" in found.wanted and choice.objective != "kfac"
                facts = {"spread": spread, "lossless": exact_rank(W, name=target.name)}
                return spectrum_of(whole, full, of, rounding=lost, **facts)

            waiting = [b for b in span if not job.keeper.has(piece_name(stage, b))]
            targets = [target for block in waiting for target in block.targets]
            spectra = shared_spectra(job.team, targets, owned, find, job.device)
            for block in span:
                known = spectra if block in waiting else None
                note_block(job.keeper, stage, block, found, shapes, known, job.device)
                job.progress.advance("survey", block.name)
    job.progress.finish("survey")
    if "kfac" in found.wanted and choice.objective == "kfac":
        for curve in found.curves:
            note_loss(found, "kfac", curve.name, torch.from_numpy(np.array(curve.energy)))
            if curve.name in found.seen:
                losses = found.losses["kfac"]
                losses[curve.name] = weighed(losses[curve.name], found.seen[curve.name])


def _facts(job: Job, found: Found) -> dict:
    """For people, JSON-ready."""
    return {
        "calibration": job.windows.record() if job.windows is not None else None,
        "sign_stability": found.stability,
        "damping": found.damping,
        "seconds": dict(job.log.stages),
    }
