"""Experts in one parameter become single layers, in a model in memory and in one that is not."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from spectrim.errors import ModelError
from spectrim.model.anatomy import Anatomy
from spectrim.model.experts.layout import ExpertLayout
from spectrim.model.experts.unfold import unfold, unfold_tensors
from spectrim.model.experts.watching import find_experts
from spectrim.model.onload import Source
from spectrim.model.tracing import ROUTER
from spectrim.run.job import RunLog
from spectrim.run.loading import LoadedModel
from spectrim.run.texts import vocabulary_size

LEAST_UNDERSTOOD = 0.5
"""A model of which less than this share of the blocks' weights are targets is refused."""


def short_window(loaded: LoadedModel) -> Tensor:
    """A few tokens that show how a model is built, (1, 8)."""
    return torch.arange(8, device=loaded.device)[None] % vocabulary_size(loaded.model)


def open_experts(loaded: LoadedModel) -> None:
    """Put one linear layer per expert and matrix in the place of 3-D parameters, in place.

    The model computes what it did before. A model that has no such parameters is not run at all.
    """
    layouts, _ = find_experts(loaded.model, short_window(loaded))
    unfold(loaded.model, layouts)
    onloader = loaded.onloader
    if onloader is None:
        return
    for unit, source in onloader.sources().items():
        inside = {
            name.removeprefix(f"{unit}."): layout
            for name, layout in layouts.items()
            if name.startswith(f"{unit}.")
        }
        if inside:
            onloader.read_from(unit, _through(source, inside))


def _through(source: Source, layouts: dict[str, ExpertLayout]) -> Source:
    """Reads a block as it is in its file, and hands out its experts one by one."""
    return partial(_unfolded, source, layouts)


def _unfolded(source: Source, layouts: dict[str, ExpertLayout]) -> dict[str, Tensor]:
    return unfold_tensors(source(), layouts)


def check_understood(loaded: LoadedModel, anatomy: Anatomy, *, partly: bool) -> str | None:
    """Refuse a model whose blocks are mostly something else than what can be compressed.

    Args:
        loaded: the model.
        anatomy: its targets.
        partly: compress what can be compressed all the same.

    Returns:
        A note for the report where only a part can be compressed.

    Raises:
        ModelError: names the family, the largest parameter that is left alone, and why.
    """
    blocks = tuple(f"{block.name}." for block in anatomy.blocks)
    sizes = {n: p.numel() for n, p in loaded.model.named_parameters() if n.startswith(blocks)}
    covered = sum(t.out_features * t.in_features for t in anatomy.targets)
    if covered >= LEAST_UNDERSTOOD * sum(sizes.values()):
        return None
    odd = {name: why for name, why in anatomy.left_alone.items() if why != ROUTER}
    largest = max(odd, key=lambda name: sizes.get(name, sizes.get(f"{name}.weight", 0)))
    found = (
        f"{covered / sum(sizes.values()):.0%} of the weights in the blocks of "
        f"{type(loaded.model).__name__} can be compressed; the largest of the others is "
        f"{largest}: {odd[largest]}"
    )
    if not partly:
        raise ModelError(
            f"{found}; to compress the rest only, set `targets.partly` in the recipe to true"
        )
    return found


def note_experts(log: RunLog) -> None:
    """Say which experts were cut without tokens of their own, and how many with few."""
    counts = {n: said for n, said in log.targets.items() if said.get("pooled_share") is not None}
    unseen = [name for name, said in counts.items() if not said["expert_tokens"]]
    few = [n for n, said in counts.items() if said["expert_tokens"] and said["pooled_share"] > 0.5]
    if unseen:
        more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
        log.notes.append(
            f"{len(unseen)} of {len(counts)} layers of experts saw no calibration token and were "
            f"cut by the moments of the other experts of their block: {', '.join(unseen[:3])}{more}"
        )
    if few:
        log.notes.append(
            f"{len(few)} of {len(counts)} layers of experts saw so few calibration tokens that "
            "their block's pooled moments weigh more than their own (pooled_share of each target)"
        )
