"""Moments of experts that saw few tokens, shrunk towards what is known of all experts of a block.

A router gives every expert a few of the calibration tokens, and some experts next to none. The
mean moments of n tokens of width d are blended with a target, which counts as much as `WORTH * d`
tokens:

    M' = (1 - a) M + a T,   a = WORTH d / (WORTH d + n)

Where all experts of a step read the same hidden states (or write them, for output gradients), T is
the mean moment over the tokens of all of them. Elsewhere a coordinate of one expert has nothing to
do with that of another, and T keeps this expert's own mean squares and drops the correlations,
which are what few tokens say least about. An expert that saw no token counts as if it had seen one
like the others' mean. Sums stay sums: an expert weighs as much as it has tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from spectrim.model.anatomy import Group
from spectrim.moments.moments import Moments

__all__ = ["WORTH", "BlockMoments", "Pool", "blended_inputs", "pooled_share"]

WORTH = 0.25
"""Tokens per input dimension that the target of the shrinkage counts for."""


def pooled_share(tokens: int, width: int) -> float:
    """The share a of the target where an expert of that width saw so many tokens."""
    prior = WORTH * width
    return prior / (prior + tokens)


class Pool:
    """What all experts of a step say together, for one kind of sum.

    Args:
        width: of the tokens.
        common: whether a coordinate means the same in every expert.
    """

    def __init__(self, width: int, *, common: bool):
        self.width = width
        self.common = common
        self.tokens = 0
        self._sum: Tensor | None = None

    def add(self, total: Tensor, tokens: int) -> None:
        """One expert's sum over its tokens, (d, d) or (d,)."""
        self._sum = total.clone() if self._sum is None else self._sum + total
        self.tokens += tokens

    def blended(self, total: Tensor, tokens: int) -> Tensor:
        """One expert's sum with its share of the target; of one mean token where it saw none."""
        if self._sum is None or not self.tokens:
            return total
        share = pooled_share(tokens, self.width)
        mean = self._sum / self.tokens
        if not tokens:
            return mean if self.common else _level(mean)
        if self.common:
            return (1 - share) * total + share * tokens * mean
        if total.ndim == 1:
            return total
        blended = (1 - share) * total
        blended.diagonal().add_(share * total.diagonal())
        return blended


class BlockMoments(Sequence[Moments]):
    """Input moments of some groups of a block, those of experts blended, made when asked for.

    Sums may be held in less memory than their matrices: those of one group at a time are whole.

    Args:
        groups: of one block.
        sums: place of a group -> its moments as summed over all processes.
    """

    def __init__(self, groups: Sequence[Group], sums: Callable[[int], Moments]):
        self._groups = tuple(groups)
        self._sums = sums
        self._pools: dict[tuple[str, str], Pool] = {}
        for place, group in enumerate(groups):
            if group.expert is None:
                continue
            found = sums(place)
            for key, total in _matrices(found).items():
                fresh = Pool(group.in_features, common=group.expert.reads_common)
                self._pools.setdefault((group.expert.step, key), fresh).add(total, found.tokens)

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, place: int) -> Moments: ...
    @overload
    def __getitem__(self, place: slice) -> list[Moments]: ...
    def __getitem__(self, place: int | slice) -> Moments | list[Moments]:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        group, found = self._groups[place], self._sums(place)
        if group.expert is None:
            return found
        blended = {
            key: self._pools[group.expert.step, key].blended(total, found.tokens)
            for key, total in _matrices(found).items()
        }
        share = pooled_share(found.tokens, group.in_features)
        return replace(found, **blended, tokens=max(1, found.tokens), pooled=share)


def _matrices(found: Moments) -> dict[str, Tensor]:
    sums = {key: getattr(found, key) for key in ("C", "shifted", "cross", "absolute")}
    return {key: total for key, total in sums.items() if total is not None}


def blended_inputs(groups: Sequence[Group], moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """All of `BlockMoments`, by a group's first target."""
    names = [group.targets[0].name for group in groups]
    found = BlockMoments(groups, lambda place: moments[names[place]])
    return dict(zip(names, found, strict=True))


def _level(mean: Tensor) -> Tensor:
    """Nothing but the size of a moment: every coordinate like the mean of all."""
    if mean.ndim == 1:
        return torch.full_like(mean, float(mean.mean()))
    return float(mean.diagonal().mean()) * torch.eye(
        mean.shape[0], dtype=mean.dtype, device=mean.device
    )
