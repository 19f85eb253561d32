"""What decides how much a run holds in memory: sizes of the model, where and how it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from spectrim.model.experts.stack import ExpertStack, GateUp
from spectrim.model.experts.watching import candidates
from spectrim.model.onload import unit_names
from spectrim.model.weights import get_module, is_linear

Backward = Literal["whole", "recomputed", "by block"]
"""How a gradient pass goes: the graph of all blocks at once; the states in front of every block
kept and a block's graph at a time; or block by block, where not even all sums fit."""


@dataclass(frozen=True)
class Setting:
    """Where and how a run will work."""

    device: torch.device
    working: torch.dtype
    stored: torch.dtype
    out_of_core: bool
    offloaded: bool
    windows: int
    window_length: int


@dataclass(frozen=True)
class Room:
    """How a run is made to fit: what changes rounding, time and memory, but no result.

    Attributes:
        batch: windows per forward pass.
        graph: windows per backward pass.
        backward: how gradients are taken.
        restarts: begin a block's forwards anew at every group instead of pausing them.
    """

    batch: int
    graph: int
    backward: Backward = "whole"
    restarts: bool = False


@dataclass(frozen=True)
class Sizes:
    """What the skeleton says: numbers of parameters, and the linears of the largest block.

    `inputs` are the widths of its groups, `routed` those of its experts' groups.
    """

    width: int
    vocabulary: int
    blocks: int
    block: int
    other: int
    linears: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    routed: tuple[int, ...] = ()

    @property
    def widest(self) -> int:
        """Largest input plus output of a linear: what an activation of a token takes."""
        return max(m + n for m, n in self.linears)


def read_sizes(config: Any, trust_remote_code: bool) -> Sizes:
    """Sizes of the model that a configuration describes; no weight is made."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        skeleton: Any = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
    return sizes_of(skeleton)


def sizes_of(skeleton: Any) -> Sizes:
    """Sizes of a model, in memory or not."""
    blocks = [get_module(skeleton, name) for name in unit_names(skeleton)]
    largest = max(blocks, key=_parameters)
    linears, inputs, routed = [], [], []
    for parent in largest.modules():
        own = [m for m in parent.children() if is_linear(m)]
        shapes = [_shape(m) for m in own]
        linears += shapes
        if isinstance(parent, ExpertStack):
            routed += [n for _, n in shapes]
            continue
        if isinstance(parent, GateUp):
            routed.append(shapes[0][1])
            continue
        for width in dict.fromkeys(n for _, n in shapes):
            alike = sum(n == width for _, n in shapes)
            # Three or more of one width are an attention's: its output projection stands alone.
            inputs += [width] * (2 if alike > 2 else 1)
    for experts, m, n in (parameter.shape for parameter in candidates(largest).values()):
        # A skeleton that was not run does not say from which side tokens are multiplied.
        linears += experts * [(m, n)]
        routed += experts * [n]
    embedding = skeleton.get_input_embeddings().weight
    inside = sum(map(_parameters, blocks))
    return Sizes(
        width=embedding.shape[1],
        vocabulary=embedding.shape[0],
        blocks=len(blocks),
        block=_parameters(largest),
        other=_parameters(skeleton) - inside,
        linears=tuple(linears),
        inputs=tuple(inputs),
        routed=tuple(routed),
    )


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _shape(linear: Any) -> tuple[int, int]:
    return (
        (linear.out_features, linear.in_features)
        if isinstance(linear, nn.Linear)
        else (tuple(reversed(linear.weight.shape)))
    )
