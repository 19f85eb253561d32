"""One product for all experts of a block instead of one per expert, where ranks are equal.

Tokens sorted by expert meet `A` (E, k, in) and then `B` (E, out, k) in torch's `grouped_mm`: two
launches, however many experts have tokens. Experts whose matrices were cut to one rank
(`allocate.experts: equal`) and are stored as two factors have such `A` and `B`; gate and up of an
expert read the same tokens, so their `A` are one. The factors of an expert become views of them:
names, values and what is saved stay as they are, and no memory is taken.

Only implementations that sort tokens come here (`grouped_mm`, which transformers chooses by
default); under any other the experts are called one by one as before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.swap import compressed_layers
from spectrim.model.experts.layout import ExpertLayout
from spectrim.model.experts.stack import GateUp
from spectrim.model.experts.unfold import expert_stacks

ALIGNMENT = 16
"""Bytes that rows of grouped operands are multiples of."""


class GroupedFactors:
    """The factors of all experts of one stack.

    Args:
        layout: of the parameter that the stack stands for.
        parts: for every matrix of an expert its layers, one per expert, all of one rank.
    """

    def __init__(self, layout: ExpertLayout, parts: Sequence[Sequence[LowRankLinear]]):
        self.layout = layout
        self.ranks = [int(layers[0].down.weight.shape[0]) for layers in parts]
        down = torch.stack(
            [torch.cat([x.down.weight.detach() for x in own]) for own in zip(*parts, strict=True)]
        )
        self.down = down  # (E, sum of ranks, in)
        self.up = [torch.stack([x.up.weight.detach() for x in layers]) for layers in parts]
        for layers, up, rows in zip(parts, self.up, down.split(self.ranks, 1), strict=True):
            for layer, B, A in zip(layers, up, rows, strict=True):
                for own, value in ((layer.up, B), (layer.down, A)):
                    trained = own.weight.requires_grad
                    own.weight = nn.Parameter(value, requires_grad=trained)

    def __call__(self, x: Tensor, offs: Tensor) -> Tensor:
        """Outputs (S, out) for tokens (S, in) sorted by expert; expert e has those before offs[e].

        Rows of tokens that no expert has are zeros.
        """
        hidden = _product(x, self.down, offs).split(self.ranks, 1)
        pairs = zip(hidden, self.up, strict=True)
        y = self.layout.outputs(tuple(_product(h.contiguous(), B, offs) for h, B in pairs))
        return torch.where(torch.arange(len(x), device=x.device)[:, None] < offs[-1], y, 0)


def _product(x: Tensor, weights: Tensor, offs: Tensor) -> Tensor:
    """(S, n) times (E, m, n) -> (S, m)."""
    return nn.functional.grouped_mm(x, weights.mT, offs=offs)


def group_experts(model: nn.Module) -> tuple[set[str], dict[str, str]]:
    """Group the experts of every block of which they can be, in place; for running only.

    Returns:
        Module paths of the layers that are multiplied together now, and the name of each other
        stack of experts -> why its experts are called one by one.
    """
    grouped: set[str] = set()
    left = {}
    for name, stack in expert_stacks(model).items():
        members = [_layers(member) for member in stack]
        reason = _obstacle(layer for layers in members for layer in layers)
        if reason is None:
            parts = list(zip(*members, strict=True))
            ranks = [{layer.rank for layer in layers} for layers in parts]
            if any(len(found) > 1 for found in ranks):
                reason = "ranks of its experts differ"
        if reason is None:
            stack.together = GroupedFactors(stack.layout, parts)
            grouped |= {f"{name}.{path}" for path in compressed_layers(stack)}
        else:
            left[name] = reason
    return grouped, left


def _layers(member: nn.Module) -> tuple[Any, ...]:
    return (member.gate, member.up) if isinstance(member, GateUp) else (member,)


def _obstacle(layers: Iterable[Any]) -> str | None:
    """Why layers cannot be multiplied together, None if they can."""
    if not hasattr(nn.functional, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    for layer in layers:
        if not isinstance(layer, LowRankLinear):
            return f"it holds a {type(layer).__name__}"
        if type(layer.down) is not nn.Linear or type(layer.up) is not nn.Linear:
            return "its factors are no plain matrices"
        if layer.rank * layer.up.weight.element_size() % ALIGNMENT:
            return f"a rank of {layer.rank} is not aligned; `allocate.multiple: 8` is"
    return None
