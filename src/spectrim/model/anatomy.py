"""What a decoder is to spectrim: blocks, targets, and groups of targets that share an input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Expert:
    """Which expert of a mixture a target belongs to; it sees the tokens routed to it, no others.

    Attributes:
        number: of the expert.
        step: names what the experts of a block do at the same time, e.g. `mlp.experts.down_proj`.
        reads_common: whether inputs are the block's hidden states, as those of the other experts,
            and not coordinates of this expert's own.
        writes_common: whether outputs are.
    """

    number: int
    step: str
    reads_common: bool
    writes_common: bool


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
        expert: of a mixture, None for a layer that every token passes.
        joins: path, inside the block, of the module whose input the output is added to, empty for
            the block's own input; None where no such sum was seen (`model/joins.py`).
    """

    name: str
    projection: str
    block: int
    group: int
    out_features: int
    in_features: int
    bias: bool
    transposed: bool = False
    expert: Expert | None = None
    joins: str | None = None

    @property
    def matrix(self) -> str:
        """What the same layer of every expert is called: the projection without the number."""
        if self.expert is None:
            return self.projection
        parts, number = self.projection.split("."), str(self.expert.number)
        place = len(parts) - 1 - parts[::-1].index(number)
        return ".".join([*parts[:place], *parts[place + 1 :]])


@dataclass(frozen=True)
class Group:
    """Targets of one block that read the same input tensor, in execution order."""

    block: int
    index: int
    in_features: int
    targets: tuple[Target, ...]

    @property
    def expert(self) -> Expert | None:
        """The expert whose tokens it reads, None where it reads all tokens."""
        return self.targets[0].expert

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

    @property
    def stages(self) -> tuple[tuple[Group, ...], ...]:
        """Groups whose inputs do not depend on one another: one, or a step of all experts."""
        found: dict[str, list[Group]] = {}
        for group in self.groups:
            key = str(group.index) if group.expert is None else f"experts {group.expert.step}"
            found.setdefault(key, []).append(group)
        return tuple(map(tuple, found.values()))


@dataclass(frozen=True)
class Anatomy:
    """The blocks of a decoder, found by tracing one window, and what was left alone.

    Attributes:
        blocks: in execution order.
        left_alone: module or parameter path -> why it is not a target (routers, convolutions).
    """

    blocks: tuple[Block, ...]
    left_alone: dict[str, str]

    @property
    def is_mixture(self) -> bool:
        """Whether some targets see only the tokens that are routed to them."""
        return any(group.expert is not None for group in self.groups())

    @property
    def targets(self) -> tuple[Target, ...]:
        """All targets of the model in execution order."""
        return tuple(t for b in self.blocks for t in b.targets)

    def groups(self) -> Iterator[Group]:
        """All groups of the model in execution order."""
        for block in self.blocks:
            yield from block.groups
