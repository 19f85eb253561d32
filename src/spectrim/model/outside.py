"""How much of a model lies outside the budget, which counts targets only, and for which reasons."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from spectrim.model.anatomy import Anatomy
from spectrim.model.weights import get_module

MOST_REASONS = 4
"""Reasons that a sentence names; the rest is summed up."""


@dataclass(frozen=True)
class Outside:
    """Numbers of parameters; what is shared (tied) counts once.

    Attributes:
        blocks: in the blocks, targets included.
        model: in the whole model.
        in_blocks: reason -> parameters of the blocks that are no part of a target.
        elsewhere: kind -> parameters outside the blocks.
    """

    blocks: int
    model: int
    in_blocks: Mapping[str, int]
    elsewhere: Mapping[str, int]

    @property
    def words(self) -> str:
        """Shares of the block parameters and of the whole model, by reason, largest first."""
        inside, everywhere = sum(self.in_blocks.values()), dict(self.elsewhere)
        if inside:
            everywhere["in the blocks"] = inside
        total = sum(everywhere.values())
        return (
            f"{_percent(inside, self.blocks)} of the block parameters"
            f"{_listed(self.in_blocks, self.blocks)} and {_percent(total, self.model)} of the "
            f"whole model{_listed(everywhere, self.model)}"
        )

    def record(self) -> dict[str, Any]:
        """JSON-ready: the sentence and the counts behind it, largest first."""
        return {
            "words": self.words,
            "parameters": {"blocks": self.blocks, "model": self.model},
            "in_blocks": _largest_first(self.in_blocks),
            "elsewhere": _largest_first(self.elsewhere),
        }


def count_outside(model: nn.Module, anatomy: Anatomy) -> Outside:
    """Count what is no target, on a model that has not been cut.

    Only shapes are read: parameters may be on the meta device.
    """
    targets = {t.name for t in anatomy.targets}
    inside = tuple(f"{block.name}." for block in anatomy.blocks)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    blocks, whole = 0, 0
    in_blocks: Counter[str] = Counter()
    elsewhere: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        count, owner = parameter.numel(), name.rpartition(".")[0]
        whole += count
        if not name.startswith(inside):
            elsewhere[_kind(get_module(model, owner), parameter, head)] += count
            continue
        blocks += count
        if owner not in targets:
            reason = anatomy.left_alone.get(name) or anatomy.left_alone.get(owner)
            # What follows the colon names single layers or the user's patterns.
            in_blocks[reason.partition(": ")[0] if reason else _small(parameter)] += count
    return Outside(blocks, whole, in_blocks, elsewhere)


def _small(parameter: Tensor) -> str:
    return "norms, biases and other vectors" if parameter.ndim < 2 else "other parameters"


def _kind(owner: nn.Module, parameter: Tensor, head: nn.Module | None) -> str:
    """What a parameter outside the blocks is."""
    if isinstance(owner, nn.Embedding):
        tied = parameter is getattr(head, "weight", None)
        return "embeddings, shared with the head" if tied else "embeddings"
    return "the head" if owner is head else f"{_small(parameter)} outside the blocks"


def _largest_first(counts: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))


def _listed(counts: Mapping[str, int], whole: int) -> str:
    """` (8.1 % router; 4.3 % norms)`; nothing for nothing."""
    ordered = list(_largest_first(counts).items())
    named, rest = ordered[:MOST_REASONS], ordered[MOST_REASONS:]
    if len(rest) == 1:
        named, rest = ordered, []
    parts = [f"{_percent(count, whole)} {reason}" for reason, count in named]
    if rest:
        parts.append(f"{_percent(sum(c for _, c in rest), whole)} for {len(rest)} other reasons")
    return f" ({'; '.join(parts)})" if parts else ""


def _percent(part: int, whole: int) -> str:
    """One decimal; what is not nothing never reads as nothing, nor what is not all as all."""
    if part in (0, whole):
        return "100 %" if part else "0 %"
    share = 100 * part / whole
    return "<0.1 %" if share < 0.05 else ">99.9 %" if share >= 99.95 else f"{share:.1f} %"
