"""Streaming sums for one group: every batch of inputs is reduced to second moments on the spot."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from spectrim.errors import NonFiniteError
from spectrim.moments.moments import Moments

__all__ = ["MomentAccumulator"]


def reduction_dtype(device: torch.device) -> torch.dtype:
    """fp64 where it is native; fp32 products with an fp64 running sum on accelerators."""
    return torch.float64 if device.type == "cpu" else torch.float32


class MomentAccumulator:
    """Sums `x xᵀ` and its relatives over batches for one group.

    Args:
        name: the group's name in error messages.
        needs: which of `C`, `shifted`, `cross`, `absolute` to accumulate.
    """

    def __init__(self, name: str, needs: Collection[str]):
        self.name = name
        self.needs = frozenset(needs)
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, x: Tensor | None, shifted: Tensor | None = None) -> None:
        """Add one batch of inputs, (tokens, in) or (..., in); both streams hold the same tokens.

        Raises:
            NonFiniteError: an input holds NaN or infinity; the message names the group.
        """
        x = None if x is None else self._rows(x, "input")
        shifted = None if shifted is None else self._rows(shifted, "shifted input")
        reference = x if x is not None else shifted
        if reference is None:
            raise ValueError("a batch needs at least one stream")
        self.tokens += reference.shape[0]
        if x is not None and "C" in self.needs:
            self._accumulate("C", x.mT @ x)
        if shifted is not None and "shifted" in self.needs:
            self._accumulate("shifted", shifted.mT @ shifted)
        if x is not None and shifted is not None and "cross" in self.needs:
            self._accumulate("cross", x.mT @ shifted)
        if x is not None and "absolute" in self.needs:
            self._accumulate("absolute", x.abs().sum(0))

    def _rows(self, x: Tensor, what: str) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).to(reduction_dtype(x.device))
        if not bool(torch.isfinite(rows).all()):
            raise NonFiniteError(
                f"non-finite {what} at {self.name}: the model overflows on this text in its dtype; "
                "try --dtype float32 or other calibration text"
            )
        return rows

    def _accumulate(self, key: str, value: Tensor) -> None:
        value = value.to(torch.float64)
        if key in self.sums:
            self.sums[key] += value
        else:
            self.sums[key] = value

    def moments(self) -> Moments:
        """The sums so far."""
        return Moments(
            tokens=self.tokens,
            C=self.sums.get("C"),
            shifted=self.sums.get("shifted"),
            cross=self.sums.get("cross"),
            absolute=self.sums.get("absolute"),
        )
