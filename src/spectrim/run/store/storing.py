"""The last stage of a run: every target takes the form in which it will be stored.

Targets are factored while they are cut and refined, because that is what can be trained. Here
packed targets are packed and integer formats are rounded, block by block, with the second moments
of the inputs that the finished network really has: a sequential pass without training after it has
met them on its way, otherwise they take one more pass over the calibration windows.
What becomes of a target is in the plan that is returned, with its true bytes, and in the report.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from spectrim.allocate.budget import Shape, layer_bytes
from spectrim.allocate.forms import AUTO, RESIDUAL
from spectrim.allocate.plan import Plan, PlanEntry
from spectrim.allocate.rules import RULES
from spectrim.errors import RecipeError
from spectrim.formats import JOINT
from spectrim.layers.layout import layout_of
from spectrim.layers.swap import swap_in
from spectrim.model.anatomy import Block, Target
from spectrim.model.replay import Replay
from spectrim.model.weights import get_module, read_weight
from spectrim.moments.moments import Moments
from spectrim.recipe import Recipe
from spectrim.run.job import Job
from spectrim.run.parts.cutting import output_metric, rounds_at_cut
from spectrim.run.parts.passing import advance, block_moments
from spectrim.run.parts.sharing import owners_of
from spectrim.run.recorded import recorded
from spectrim.run.store.converting import Conversion, Converter
from spectrim.run.store.sharing import shared_conversions

STAGE = "store"


def check_storage(recipe: Recipe) -> None:
    """Refuse a storage that the recipe's flow would pass over.

    Raises:
        RecipeError: the flow learns its ranks, and counts them as factored native numbers.
    """
    choice = recipe.storage
    if choice.kind == "dense" and choice.weights == "native":
        raise RecipeError(
            "storage dense cuts nothing and weights native round nothing: with dense, give "
            "--weights auto or a number format such as int4-g32"
        )
    if choice.kind == RESIDUAL and not _base_is_coded(choice.weights):
        raise RecipeError(
            f"storage residual rounds a whole matrix, and weights {choice.weights!r} begin with "
            "native numbers: give --weights auto, or formats of the base and of its correction "
            "such as int3-g128+int8"
        )
    weighing = [name for name, rule in RULES.items() if rule.weighs_forms]
    asked = {
        "weights auto": choice.weights == AUTO,
        f"storage {choice.kind}": choice.kind in ("dense", RESIDUAL),
        "storage alike": choice.alike,
    }
    what = next((words for words, wanted in asked.items() if wanted), None)
    if what is not None and recipe.allocate.rule not in weighing:
        raise RecipeError(
            f"{what} needs a rule that weighs forms against each other, which only "
            f"{', '.join(weighing)} does; the recipe {recipe.name!r} has {recipe.allocate.rule}. "
            + ("Name a format, for example int8, or use" if what == "weights auto" else "Use")
            + " the default recipe"
        )
    if recipe.flow == "learned" and (choice.kind, choice.weights) != ("factored", "native"):
        raise RecipeError(
            f"storage {choice.kind!r} with weights {choice.weights!r} does not go with the recipe "
            f"{recipe.name!r}: recipes with flow 'learned' store factored native numbers; "
            "what works with other storages are the flows one-shot and sequential"
        )


def _base_is_coded(weights: str) -> bool:
    return weights == AUTO or layout_of(RESIDUAL, weights).told_apart


@torch.no_grad()
def store(job: Job, plan: Plan, dtype: torch.dtype) -> Plan:
    """Convert the targets that are not stored as they are, in place.

    Args:
        job: the run; its model is finished but for this.
        plan: as carried out so far.
        dtype: of the checkpoint.

    Returns:
        The plan with the storage, rank and bytes that every target really has.

    Raises:
        NumericalError: a matrix cannot be packed or solved for; names the target.
    """
    waiting = {e.name: e for e in plan.entries if e.converts and not rounds_at_cut(job.recipe, e)}
    if not waiting:
        return plan
    found: dict[str, Conversion] = {}
    job.progress.start(STAGE, len(job.anatomy.blocks))
    with job.log.timed(STAGE):
        replay = _replay(job)
        for block in job.anatomy.blocks:
            with job.keeper.at_hand(block):
                if job.keeper.is_finished(STAGE, block):
                    found.update(_taken_over(job, block, waiting, replay))
                else:
                    moments = _inputs(job, block, replay)
                    found.update(_convert_block(job, block, waiting, moments, dtype))
                    job.keeper.finish(STAGE, block)
            job.progress.advance(STAGE, block.name)
    job.progress.finish(STAGE)
    stored = _as_carried_out(job, plan, found)
    job.log.notes.extend(_summaries(job, plan, stored, found))
    return stored


def _replay(job: Job) -> Replay | None:
    """The calibration windows on their way through the network, where some block needs them."""
    blocks = job.anatomy.blocks
    known = all(job.keeper.is_finished(STAGE, b) or job.finished_inputs.has(b) for b in blocks)
    return None if job.windows is None or known else recorded(job, job.ids)


def _inputs(job: Job, block: Block, replay: Replay | None) -> Mapping[int, Moments]:
    """Moments of a block's groups in the finished network, by their index; none without data."""
    if job.finished_inputs.has(block):
        if replay is not None:
            advance(job, replay, block)
        return job.finished_inputs.of(block)
    if replay is None:
        return {}
    return block_moments(job, replay, block, frozenset({"C"}))


def _convert_block(
    job: Job,
    block: Block,
    waiting: dict[str, PlanEntry],
    moments: Mapping[int, Moments],
    dtype: torch.dtype,
) -> dict[str, Conversion]:
    """Convert a block's targets, each on the process that owns it."""
    targets = [target for target in block.targets if target.name in waiting]
    owned = owners_of(job.team, targets)
    converted = {}
    for target in targets:
        if owned[target.name] == job.team.rank:
            entry, of = waiting[target.name], moments.get(target.group)
            layer, known = get_module(job.model, target.name), _truncation(job, target)
            G = _output_metric(job, target, layer) if entry.corrected else None
            converted[target.name] = Converter(entry, dtype, of, known, G).convert(layer)
    found = shared_conversions(job, targets, owned, converted)
    for target in targets:
        result = found[target.name]
        swap_in(job.model, target.name, result.layer)
        facts: dict[str, Any] = {"stored_error": result.error}
        if result.note is not None:
            facts["storage_note"] = result.note
        job.log.target(target.name, **facts)
        # The model has the layer; where blocks are released, nothing else may hold it.
        found[target.name] = replace(result, layer=None)
    return found


def _output_metric(job: Job, target: Target, layer: Any) -> torch.Tensor | None:
    """As the original network's gradients say, None for recipes without them."""
    if job.outputs is None:
        return None
    W, output = read_weight(layer).detach(), job.outputs[target.name]
    return output_metric(target, W.double(), job.recipe.decompose, output)


def _taken_over(
    job: Job, block: Block, waiting: dict[str, PlanEntry], replay: Replay | None
) -> dict[str, Conversion]:
    """A block that an earlier run has converted; the stream passes it as it was before that."""
    if replay is not None:
        advance(job, replay, block)
    job.keeper.restore(STAGE, block)
    found = {}
    for target in block.targets:
        if target.name in waiting:
            layer: Any = get_module(job.model, target.name)
            facts = job.log.targets[target.name]
            found[target.name] = Conversion(
                None, layer.storage, layer.rank, facts["stored_error"], facts.get("storage_note")
            )
    return found


def _truncation(job: Job, target: Target) -> float | None:
    """Relative error of the cut as a ratio of norms, from what the cut left in the log."""
    facts = job.log.targets.get(target.name, {})
    squared = facts.get("measured_error", facts.get("predicted_error"))
    return None if squared is None else math.sqrt(max(squared, 0.0))


def _as_carried_out(job: Job, plan: Plan, found: dict[str, Conversion]) -> Plan:
    shapes = {t.name: Shape(t.out_features, t.in_features, t.bias) for t in job.anatomy.targets}
    entries = []
    for entry in plan.entries:
        result = found.get(entry.name)
        if result is not None and result.storage != entry.storage:
            stored = layer_bytes(
                shapes[entry.name],
                rank=result.rank,
                storage=result.storage,
                weights=entry.weights,
                dtype_bytes=job.dtype_bytes,
            )
            # The prediction was for another rank.
            entry = replace(
                entry, rank=result.rank, storage=result.storage, bytes=stored, loss=None
            )
        entries.append(entry)
    return replace(plan, entries=tuple(entries))


def _summaries(job: Job, plan: Plan, stored: Plan, found: dict[str, Conversion]) -> list[str]:
    """What a reader of the report must know of the stage as a whole."""
    notes = []
    packed = [e.name for e in plan.entries if e.storage == "packed"]
    changed = [n for n in packed if found[n].storage != "packed"]
    rough = [n for n in packed if found[n].note is not None and n not in changed]
    if changed:
        notes.append(
            f"{len(changed)} of {len(packed)} packed targets are stored factored at the smaller "
            f"rank that their bytes allow, because packing would round away more (storage_note of "
            f"each target); achieved keep {plan.achieved_keep:.6f} -> {stored.achieved_keep:.6f}"
        )
    if rough:
        notes.append(
            f"{len(rough)} of {len(packed)} packed targets round noticeably against their "
            "truncation error and are still better than factored ones of the same bytes "
            "(storage_note of each target)"
        )
    for weights in sorted({e.weights for e in stored.entries if e.name in found} - {"native"}):
        notes.append(_rounding_note(job, stored, found, weights))
    return notes


def _rounding_note(job: Job, stored: Plan, found: dict[str, Conversion], weights: str) -> str:
    """How much a number format rounds away, beside the size of the format alone."""
    kinds = []
    for storage in sorted({e.storage for e in stored.entries}):
        errors = [
            found[e.name].error
            for e in stored.entries
            if e.weights == weights and e.storage == storage and e.name in found
        ]
        if errors:
            kinds.append(
                f"{len(errors)} {storage} (median {statistics.median(errors):.1e}, largest "
                f"{max(errors):.1e})"
            )
    alone = sum(
        layer_bytes(
            Shape(t.out_features, t.in_features, t.bias),
            rank=None,
            storage="dense",
            weights=weights.split(JOINT)[0],
            dtype_bytes=job.dtype_bytes,
        )
        for t in job.anatomy.targets
    )
    dense = sum(e.dense_bytes for e in stored.entries)
    note = (
        f"{weights} rounding, relative error added per target: {', '.join(kinds)}; all targets "
        f"uncut in {weights} would take keep {alone / dense:.4f}"
    )
    if alone > sum(e.bytes for e in stored.entries):
        return note
    return (
        f"{note}, no more than this result: at this size the cut only costs; ask for less, or for "
        f"the rule knapsack, which leaves targets dense in {weights} where that is better"
    )
