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

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spectrim.model.anatomy import Group
from spectrim.moments.accumulate import MomentAccumulator
from spectrim.moments.moments import Moments

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
        if not tokens:
            return
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


class BlockMoments(Mapping[int, Moments]):
    """Input moments by a group's index, those of experts blended; made each time when asked for.

    Only one group's matrices are whole at a time: all of a block's are several times its weights.

    Args:
        groups: of one block, with all experts of a step or none.
        sums: by a group's index, of all processes' windows.
    """

    def __init__(self, groups: Sequence[Group], sums: Mapping[int, MomentAccumulator]):
        self._groups = {group.index: group for group in groups}
        self._sums = {group.index: sums[group.index] for group in groups}
        self._pools: dict[tuple[str, str], Pool] = {}
        for group in groups:
            if group.expert is None:
                continue
            found = self._sums[group.index].moments()
            for key, total in _matrices(found).items():
                fresh = Pool(group.in_features, common=group.expert.reads_common)
                self._pools.setdefault((group.expert.step, key), fresh).add(total, found.tokens)

    def keep(self, indices: Collection[int]) -> BlockMoments:
        """Let go of the sums of all other groups."""
        for index in self._sums.keys() - set(indices):
            del self._sums[index]
        return self

    def __len__(self) -> int:
        return len(self._sums)

    def __iter__(self) -> Iterator[int]:
        return iter(self._sums)

    def __getitem__(self, index: int) -> Moments:
        group, found = self._groups[index], self._sums[index].moments()
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


def _level(mean: Tensor) -> Tensor:
    """Nothing but the size of a moment: every coordinate like the mean of all."""
    if mean.ndim == 1:
        return torch.full_like(mean, float(mean.mean()))
    return float(mean.diagonal().mean()) * torch.eye(
        mean.shape[0], dtype=mean.dtype, device=mean.device
    )
