"""What a decoder is to spectrim: blocks, targets, and groups of targets that share an input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Anatomy", "Block", "Group", "Target"]


@dataclass(frozen=True)
class Target:
    """One linear layer inside a decoder block.

    Attributes:
        name: module path from the model root, e.g. `model.layers.0.self_attn.q_proj`.
        projection: the path inside its block, e.g. `self_attn.q_proj`.
        block: index of the block.
        group: index of the input-sharing group inside the block.
        out_features: m, rows of the weight in (out, in) orientation.
        in_features: n.
        bias: whether the layer has a bias.
        transposed: True where the module stores (in, out), as transformers' `Conv1D` does.
    """

    name: str
    projection: str
    block: int
    group: int
    out_features: int
    in_features: int
    bias: bool
    transposed: bool = False


@dataclass(frozen=True)
class Group:
    """Targets of one block that read the same input tensor, in execution order."""

    block: int
    index: int
    in_features: int
    targets: tuple[Target, ...]

    @property
    def key(self) -> str:
        """Stable name for files and caches, e.g. `003.1`."""
        return f"{self.block:03d}.{self.index}"


@dataclass(frozen=True)
class Block:
    """One decoder block: its module path and its groups in execution order."""

    index: int
    name: str
    groups: tuple[Group, ...]

    @property
    def targets(self) -> tuple[Target, ...]:
        """All targets in execution order."""
        return tuple(t for g in self.groups for t in g.targets)


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a decoder, found by tracing one window, and what was left alone.

    Attributes:
        blocks: in execution order.
        left_alone: module or parameter path -> why it is not a target (fused experts, routers).
    """

    blocks: tuple[Block, ...]
    left_alone: dict[str, str]

    @property
    def targets(self) -> tuple[Target, ...]:
        """All targets of the model in execution order."""
        return tuple(t for b in self.blocks for t in b.targets)

    def groups(self) -> Iterator[Group]:
        """All groups of the model in execution order."""
        for block in self.blocks:
            yield from block.groups
