"""The statistics an objective asked for, checked: present, of the right shape, finite, fp64."""

from __future__ import annotations

from torch import Tensor

from spectrim.errors import InputError
from spectrim.linalg.psd import finite, symmetrized
from spectrim.moments.moments import Moments, OutputMoments

_SYMMETRIC = frozenset({"C", "shifted", "G"})


def weight(W: Tensor, *, name: str) -> Tensor:
    """A target's weight in fp64.

    Raises:
        ValueError: not a matrix with at least one row and column.
        NonFiniteError: an entry is NaN or infinite.
    """
    if W.ndim != 2 or W.numel() == 0:
        raise ValueError(f"{name}: weight of shape {tuple(W.shape)}, expected (out, in)")
    return finite(W.detach(), name=name, what="the weight")


def statistic(
    record: Moments | OutputMoments | None, field: str, size: int, *, name: str
) -> Tensor:
    """One field of the moments in fp64; symmetric ones exactly symmetric.

    Args:
        record: the moments of the target's group, or the target's output moments.
        field: the attribute to read.
        size: the width that the target expects.
        name: the target, for messages.

    Raises:
        InputError: the field was not collected.
        ValueError: its shape does not fit the weight.
        NonFiniteError, NumericalError: it cannot be trusted.
    """
    value = None if record is None else getattr(record, field)
    if value is None:
        raise InputError(
            f"{name}: this objective needs the statistic {field!r}, which was not collected; "
            "calibrate with it or choose another objective"
        )
    if value.shape[-1] != size or value.shape[0] != size:
        raise ValueError(
            f"{name}: statistic {field!r} has shape {tuple(value.shape)}, expected width {size}"
        )
    if field in _SYMMETRIC:
        return symmetrized(value, name=name, what=f"the statistic {field!r}")
    return finite(value, name=name, what=f"the statistic {field!r}")


def tokens_of(record: Moments | OutputMoments | None) -> int:
    """Number of tokens behind the sums, at least 1 so that empty sums have a mean of zero."""
    return max(1, record.tokens) if record is not None else 1
