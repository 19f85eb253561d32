"""What several modules need of one input, computed by the first that asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Key(NamedTuple):
    """Everything besides the input object that the value depends on; compared as a whole."""

    version: int | None
    weight_version: int | None
    grad: bool
    autocast: bool


class _Held(NamedTuple):
    """A value that some members have not asked for yet."""

    x: Tensor
    key: _Key
    value: Any
    waiting: frozenset[int]


class OncePerInput:
    """A value of the input that the members take in turn; the last one drops it.

    It is used again only for the very same tensor object in the same version, with the same weight,
    gradient and autocast mode; any other call, in whatever order, computes afresh. Inference
    tensors and compiled graphs have no version counter, there identity alone decides: only modules
    that were seen to meet one unchanged tensor may be members.
    """

    def __init__(self, members: int):
        self._members = frozenset(range(members))
        # Replaced as a whole and never changed in place, so that threads cannot see half of it.
        self._held: _Held | None = None

    def take(
        self, x: Tensor, member: int, compute: Callable[[Tensor], Any], weight: Tensor | None = None
    ) -> Any:
        """The value for `x`, computed by the first who asks."""
        key = _Key(
            _version(x),
            None if weight is None else _version(weight),
            torch.is_grad_enabled(),
            torch.is_autocast_enabled(x.device.type),
        )
        held = self._held
        if held is not None and held.x is x and held.key == key and member in held.waiting:
            value, waiting = held.value, held.waiting - {member}
        else:
            value, waiting = compute(x), self._members - {member}
        self._held = _Held(x, key, value, waiting) if waiting else None
        return value

    def __getstate__(self) -> dict[str, Any]:
        """Copies start without a value."""
        return self.__dict__ | {"_held": None}


def _version(tensor: Tensor) -> int | None:
    """The in-place version, None where torch keeps none."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return None
    return tensor._version
