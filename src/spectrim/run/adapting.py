"""The best low-rank difference between two models of one architecture, as a LoRA adapter.

For every target `Δ = W_model − W_base`, and `B A` is the best rank-r approximation of `Δ` in the
metric of the model's moments: the closed form that compresses a weight compresses a difference
(`decompose/kfac.py`, `decompose/whitened.py`; without text the plain SVD, `decompose/plain.py`).
With a base that was rounded or compressed the adapter repairs it; with a base that the model was
tuned from it is the tuning, extracted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.decompose import OBJECTIVES
from spectrim.decompose.balance import balanced
from spectrim.errors import InputError, ModelError
from spectrim.evaluate.perplexity import Perplexity, perplexity
from spectrim.layers.swap import compressed_layers, restore_dense
from spectrim.model.anatomy import Anatomy
from spectrim.model.weights import get_module, is_transposed, read_weight, write_weight
from spectrim.recipe import Recipe
from spectrim.run.job import Job
from spectrim.run.loading import LoadedModel
from spectrim.run.opening import open_job
from spectrim.run.options import RunOptions
from spectrim.run.parts.cutting import decompose_target
from spectrim.run.quality import Passage, measure_before
from spectrim.run.survey.survey import moments_by_block
from spectrim.run.texts import UserText

STAGE = "adapter"


@dataclass
class Adapter:
    """Low-rank differences by target.

    Attributes:
        factors: target -> up (out, r) and down (r, in), fp32, balanced; targets of a group that
            differs have one each, all others none.
        rank: r.
        transposed: whether the targets store (in, out), transformers' `Conv1D`.
        facts: JSON-ready: what was minimized, how much of it is left, what no adapter can hold.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    rank: int
    transposed: bool
    facts: dict[str, Any] = field(default_factory=dict)


def make_adapter(
    base: LoadedModel,
    model: LoadedModel,
    recipe: Recipe,
    options: RunOptions = RunOptions(),
    *,
    rank: int,
    text: UserText = None,
    allow_differences: bool = False,
) -> Adapter:
    """What has to be added to `base` to come as close to `model` as rank r allows.

    Compressed layers of either are multiplied out in place; the base ends with the adapter added.

    Args:
        base: the model that the adapter is for.
        model: the model to reach, which gives the moments.
        recipe: objective and calibration.
        options: how and where.
        rank: r, the same for every target.
        text: the user's calibration text, None for the recipe's.
        allow_differences: leave what lies outside the targets as it is in the base.

    Raises:
        ModelError: two architectures, or nothing differs.
        InputError: a rank that a target cannot have, or differences outside the targets.
    """
    identity = base.identity()
    _multiply_out(base.model, torch.float32)
    _multiply_out(model.model, None)
    _check_pair(base, model)
    objective = OBJECTIVES[recipe.decompose.objective]
    job = open_job(model, recipe, options, text=text, calibrate=bool(objective.needs))
    _check_rank(job.anatomy, rank)
    outside = _outside(base, model, job.anatomy, allowed=allow_differences)
    before = measure_before(job, model)
    adapter = Adapter({}, rank, any(_conv(model, t.name) for t in job.anatomy.targets))
    targets = _extract(job, base.model, adapter, objective.inputs & {"C"})
    if not adapter.factors:
        raise ModelError(f"no linear layer of {model.name} differs from {base.name}'s")
    adapter.facts = {
        "rank": rank,
        "base": base.name,
        "base_identity": identity,
        "model": model.name,
        "objective": objective.name,
        "unit": objective.unit,
        "difference": sum(t["difference"] for t in targets.values()),
        "left": sum(t["left"] for t in targets.values()),
        "targets": targets,
        "outside": outside,
        "calibration": None if job.windows is None else job.windows.record(),
        "notes": job.log.notes,
    }
    losses = [perplexity(base.model, p.windows, batch=job.batch) for p in before.passages]
    _add(base.model, adapter)
    adapter.facts["measured"] = _measured(base.model, losses, before.passages, job.batch)
    return adapter


def _measured(
    adapted: nn.Module, losses: Sequence[Perplexity], passages: Sequence[Passage], batch: int
) -> list[dict[str, Any]]:
    """Perplexities of the base, of the base with its adapter, and of the model to reach."""
    return [
        {
            "kind": passage.kind,
            "base": loss.record(),
            "adapted": perplexity(adapted, passage.windows, batch=batch).record(),
            "model": passage.dense.record(),
        }
        for loss, passage in zip(losses, passages, strict=True)
    ]


@torch.no_grad()
def _extract(
    job: Job, base: nn.Module, adapter: Adapter, input_needs: frozenset[str]
) -> dict[str, dict[str, float]]:
    """Factors of every target, and what of the difference they leave, in the objective's unit."""
    choice, facts = job.recipe.decompose, {}
    job.progress.start(STAGE, len(job.anatomy.blocks))
    with closing(moments_by_block(job, STAGE, choice, input_needs)) as gathered:
        for block, inputs, outputs in gathered:
            for group in block.groups:
                pairs = {t: _difference(job.model, base, t.name) for t in group.targets}
                if not any(D.any() for D in pairs.values()):
                    continue
                for target, D in pairs.items():
                    of, out = inputs.get(group.index), outputs.get(target.name)
                    whole = decompose_target(target, D, choice, of, out, rank=adapter.rank)
                    up, down = balanced(*whole.cut(adapter.rank))
                    adapter.factors[target.name] = (up.float(), down.float())
                    facts[target.name] = {
                        "difference": whole.total,
                        "left": whole.error(adapter.rank),
                    }
            job.progress.advance(STAGE, block.name)
    job.progress.finish(STAGE)
    return facts


def _difference(model: nn.Module, base: nn.Module, name: str) -> Tensor:
    """`W_model − W_base` in fp64, (out, in)."""
    W = read_weight(get_module(model, name)).double()
    return W - read_weight(get_module(base, name)).to(W)


def _add(base: nn.Module, adapter: Adapter) -> None:
    for name, (up, down) in adapter.factors.items():
        module = get_module(base, name)
        W = read_weight(module)
        write_weight(module, W + (up @ down).to(W))


def _multiply_out(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Dense layers in the place of compressed ones; the model is an ordinary one afterwards."""
    for name in compressed_layers(model):
        restore_dense(model, name, dtype=dtype)
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def _parameters(loaded: LoadedModel) -> dict[str, nn.Parameter]:
    """Every parameter under every name it has: one model may tie what the other does not."""
    return dict(loaded.model.named_parameters(remove_duplicate=False))


def _check_pair(base: LoadedModel, model: LoadedModel) -> None:
    """Refuse two models whose linear layers do not answer to each other.

    Raises:
        ModelError: names what only one of them has, or a shape that differs.
    """
    ours, theirs = _parameters(base), _parameters(model)
    lost = sorted(ours.keys() ^ theirs.keys())
    if lost:
        holder, other = (base, model) if lost[0] in ours else (model, base)
        raise ModelError(
            f"{other.name} ({type(other.model).__name__}) lacks {lost[0]} of {holder.name} "
            f"({type(holder.model).__name__}): an adapter is the difference of two models of one "
            "architecture"
        )


def _check_rank(anatomy: Anatomy, rank: int) -> None:
    smallest = min(anatomy.targets, key=lambda t: min(t.out_features, t.in_features))
    most = min(smallest.out_features, smallest.in_features)
    if rank > most:
        raise InputError(
            f"rank is {rank}, and {smallest.name} ({smallest.out_features}, "
            f"{smallest.in_features}) has no more than {most}; choose at most that"
        )


def _conv(loaded: LoadedModel, name: str) -> bool:
    return is_transposed(get_module(loaded.model, name))


def _outside(
    base: LoadedModel, model: LoadedModel, anatomy: Anatomy, *, allowed: bool
) -> dict[str, str]:
    """Weights that are no target's and differ, with what differs.

    Values are compared in the coarser of the two stored dtypes: to have been stored in fewer bits
    is no difference.

    Raises:
        ModelError: a target has another shape.
        InputError: there are some, and none is allowed.
    """
    held = {f"{t.name}.weight" for t in anatomy.targets}
    coarse = max((base.stored_dtype, model.stored_dtype), key=lambda d: torch.finfo(d).eps)
    theirs = _parameters(model)
    found: dict[str, str] = {}
    for name, ours in _parameters(base).items():
        other = theirs[name]
        if ours.shape != other.shape:
            if name in held:
                raise ModelError(
                    f"{name} is {tuple(ours.shape)} in {base.name} and {tuple(other.shape)} in "
                    f"{model.name}: an adapter is the difference of two models of one architecture"
                )
            found[name] = f"{tuple(ours.shape)} and {tuple(other.shape)}"
        elif name not in held:
            a, b = (
                ours.detach().to(coarse).float(),
                other.detach().to(coarse).float().to(ours.device),
            )
            if not torch.equal(a, b):
                found[name] = f"{float((a - b).norm() / b.norm().clamp(min=1e-30)):.2g} of its size"
    if found and not allowed:
        raise InputError(
            f"{base.name} and {model.name} differ in {len(found)} weights that no LoRA holds: "
            f"{_listed(found)}; --allow-differences (allow_differences=True) leaves them as "
            f"they are in {base.name}"
        )
    return found


def _listed(outside: Mapping[str, str], most: int = 3) -> str:
    words = [f"{name} ({what})" for name, what in list(outside.items())[:most]]
    return ", ".join(words) + (", ..." if len(outside) > most else "")
