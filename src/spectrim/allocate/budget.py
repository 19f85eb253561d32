"""The only place that counts bytes: of a layer in every storage, and of whole models.

For a target `W (m, n)` cut to rank k the stored numbers are

    dense     m n
    factored  k (m + n)           up (m, k) and down (k, n)
    packed    k (m + n - k)       basis (k, n) and coefficients (m - k, k), or for m > n
                                  (m, k) and (k, n - k), plus an int32 order of the pivoted
                                  side (4 min(m, n) bytes)

and what a matrix of these numbers costs is said by its number format (`spectrim.formats`): scales
and the padding of rows to whole groups are counted. A bias stays in the native format.

The published size of a low-rank layer, rank `floor(keep * m n / (m + n))`, is what `rank_for`
gives for factored native storage without a bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np

from spectrim.allocate.plan import Storage, Weights
from spectrim.errors import BudgetError
from spectrim.layers.layout import layout_of
from spectrim.sizes import format_bytes

Count = TypeVar("Count", int, np.ndarray)


@dataclass(frozen=True)
class Shape:
    """A target as the budget sees it: `W (out_features, in_features)` and maybe a bias."""

    out_features: int
    in_features: int
    bias: bool = False


def components(shape: Shape) -> int:
    """Number of components of a full decomposition, `min(m, n)`."""
    return min(shape.out_features, shape.in_features)


def layer_bytes(
    shape: Shape,
    *,
    rank: int | None,
    storage: Storage,
    weights: Weights = "native",
    dtype_bytes: int = 2,
) -> int:
    """Exact stored bytes of one layer, bias included.

    Args:
        shape: of the layer.
        rank: components kept, 1..min(m, n); None for dense storage and only for it.
        storage: how the matrix is kept.
        weights: number format; `native` costs `dtype_bytes` per number.
        dtype_bytes: of the model's dtype, which the bias always has.

    Raises:
        BudgetError: for a rank outside 1..min(m, n), or one that does not go with the storage.
    """
    if (rank is not None) != layout_of(storage).low_rank:
        raise BudgetError(f"storage {storage!r} does not go with rank {rank}")
    if rank is not None and not 1 <= rank <= components(shape):
        raise BudgetError(f"rank {rank} is outside 1..{components(shape)} of {shape}")
    return _stored_bytes(shape, 0 if rank is None else rank, storage, weights, dtype_bytes)


def bytes_by_rank(
    shape: Shape,
    *,
    storage: Storage = "factored",
    weights: Weights = "native",
    dtype_bytes: int = 2,
) -> np.ndarray:
    """`layer_bytes` for every rank at once, int64 of shape (min(m, n) + 1,).

    It grows with rank, but for packed int4, whose padding can let a larger rank take less. Entry
    0 is what the formula gives for rank 0 (bias and order), a rank that no layer has.
    """
    ranks = np.arange(components(shape) + 1, dtype=np.int64)
    return _stored_bytes(shape, ranks, storage, weights, dtype_bytes)


def break_even(
    shape: Shape,
    storage: Storage = "factored",
    *,
    weights: Weights = "native",
    dtype_bytes: int = 2,
) -> int:
    """Largest rank that is stored in fewer bytes than the dense native layer, 0 if none is."""
    dense = layer_bytes(shape, rank=None, storage="dense", dtype_bytes=dtype_bytes)
    return _largest_rank(shape, dense - 1, storage, weights, dtype_bytes)


def rank_for(
    shape: Shape,
    keep: float,
    *,
    storage: Storage = "factored",
    weights: Weights = "native",
    dtype_bytes: int = 2,
) -> int | None:
    """Largest rank whose bytes are at most `keep` of the dense native layer's.

    Returns:
        The rank (0 if even rank 1 is too large), or None for the dense layer, which only
        `keep = 1` affords.

    Raises:
        BudgetError: for a keep outside (0, 1].
    """
    dense = layer_bytes(shape, rank=None, storage="dense", dtype_bytes=dtype_bytes)
    budget = budget_bytes(keep, dense)
    if budget >= dense:
        return None
    return _largest_rank(shape, budget, storage, weights, dtype_bytes)


def check_keep(keep: float) -> None:
    """Refuse a keep outside (0, 1] with a `BudgetError`."""
    if not 0 < keep <= 1:
        raise BudgetError(f"keep {keep} is not a fraction of the bytes: expected 0 < keep <= 1")


def budget_bytes(keep: float, dense_bytes: int) -> int:
    """Bytes that `keep` of `dense_bytes` allows, rounded down.

    The keep is read as the decimal number that it prints as: 0.29 of 100 bytes are 29, although
    the nearest double is a little less.
    """
    check_keep(keep)
    return int(Fraction(repr(float(keep))) * dense_bytes)


def keep_for_size(
    goal_bytes: int, *, other_bytes: int, targets_dense_bytes: int, smallest_keep: float
) -> float:
    """The keep at which the whole checkpoint has at most `goal_bytes`.

    Args:
        goal_bytes: wanted size of the checkpoint.
        other_bytes: bytes that compression leaves alone.
        targets_dense_bytes: bytes of the targets before compression.
        smallest_keep: least keep that the targets can reach (`ladder.smallest_keep`).

    Raises:
        BudgetError: where no keep gives that size; the message names the possible sizes.
    """
    smallest = other_bytes + int(np.ceil(smallest_keep * targets_dense_bytes))
    largest = other_bytes + targets_dense_bytes
    if not smallest <= goal_bytes <= largest:
        raise BudgetError(
            f"size {format_bytes(goal_bytes)} ({goal_bytes} bytes) cannot be reached: this model "
            f"can take {format_bytes(smallest)} to {format_bytes(largest)} "
            f"({smallest} to {largest} bytes), of which {format_bytes(other_bytes)} are not targets"
        )
    return (goal_bytes - other_bytes) / targets_dense_bytes


def _stored_bytes(
    shape: Shape, rank: Count, storage: Storage, weights: Weights, dtype_bytes: int
) -> Count:
    """Bytes at one rank (int) or at many (int64 array); ranks are not checked here."""
    m, n = shape.out_features, shape.in_features
    bias = m * dtype_bytes if shape.bias else 0
    return layout_of(storage, weights).bytes(m, n, rank, dtype_bytes) + bias


def _largest_rank(
    shape: Shape, budget: int, storage: Storage, weights: Weights, dtype_bytes: int
) -> int:
    """Largest rank in 0..min(m, n) with bytes <= budget."""
    if not layout_of(storage).low_rank:
        raise BudgetError(f"{storage} storage has no rank")
    by_rank = bytes_by_rank(shape, storage=storage, weights=weights, dtype_bytes=dtype_bytes)
    # No search: padding to whole int4 groups can make a larger rank the smaller one.
    return int(np.flatnonzero(by_rank <= budget)[-1:].sum())
