"""Streaming sums for one group: every batch of inputs is reduced to second moments on the spot."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from spectrim.errors import NonFiniteError
from spectrim.model.anatomy import Group
from spectrim.moments.moments import Moments
from spectrim.moments.symmetric import ROWS_PER_PRODUCT, SymmetricSum

__all__ = ["MomentAccumulator", "accumulator_of", "reduction_dtype"]


def reduction_dtype(x: Tensor) -> torch.dtype:
    """fp64 inputs stay fp64; everything else is multiplied in fp32 and summed in fp64.

    An fp32 product over a few thousand tokens is as exact as the fp32 forward pass that gave the
    tokens (a test shows the same decompositions as from fp64 products), at twice the speed.
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class MomentAccumulator:
    """Sums `x xᵀ` and its relatives over batches for one group.

    Args:
        name: the group's name in error messages.
        needs: which of `C`, `shifted`, `cross`, `absolute` to accumulate.
        dtype: of the symmetric sums; fp64 inputs are always summed in fp64.
        routed: width of the input of an expert's group. There may be no token at all, and rows of
            zeros, which some models send to the experts that were not chosen, are none.
    """

    def __init__(
        self,
        name: str,
        needs: Collection[str],
        dtype: torch.dtype = torch.float64,
        *,
        routed: int | None = None,
    ):
        self.name = name
        self.routed = routed
        self.needs = frozenset(needs)
        self.dtype = dtype
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, SymmetricSum] = {}

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
        if self.routed is not None and not bool((seen := reference.any(1)).all()):
            x = None if x is None else x[seen]
            shifted = None if shifted is None else shifted[seen]
            reference = reference[seen]
        self.tokens += reference.shape[0]
        self._square("C", x)
        self._square("shifted", shifted)
        self._products("cross", x, shifted)
        if x is not None and "absolute" in self.needs:
            self._accumulate("absolute", x.abs().sum(0))

    def _square(self, key: str, rows: Tensor | None) -> None:
        if key not in self.needs or rows is None:
            return
        if key not in self.squares:
            wide = torch.promote_types(self.dtype, rows.dtype)
            self.squares[key] = SymmetricSum(rows.shape[1], wide, rows.device)
        self.squares[key].add(rows)

    def _products(self, key: str, left: Tensor | None, right: Tensor | None) -> None:
        if key not in self.needs or left is None or right is None:
            return
        rows = zip(left.split(ROWS_PER_PRODUCT), right.split(ROWS_PER_PRODUCT), strict=True)
        for a, b in rows:
            self._accumulate(key, a.mT @ b)

    def _rows(self, x: Tensor, what: str) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).to(reduction_dtype(x))
        # A sum is not finite if one value is not, and takes a tenth of the time of looking at all.
        if not bool(torch.isfinite(rows.sum())):
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
        if self.routed is not None and not self.tokens:
            nothing = torch.zeros(0, self.routed)
            for key in self.needs & {"C", "shifted"}:
                self._square(key, nothing)
            if "cross" in self.needs:
                self._accumulate("cross", nothing.mT @ nothing)
            if "absolute" in self.needs:
                self._accumulate("absolute", nothing.sum(0))
        squares = {key: found.whole() for key, found in self.squares.items()}
        return Moments(
            tokens=self.tokens,
            C=squares.get("C"),
            shifted=squares.get("shifted"),
            cross=self.sums.get("cross"),
            absolute=self.sums.get("absolute"),
        )


def accumulator_of(
    group: Group, needs: Collection[str], dtype: torch.dtype = torch.float64
) -> MomentAccumulator:
    """Sums for a group under the name of its first target."""
    routed = None if group.expert is None else group.in_features
    return MomentAccumulator(group.targets[0].name, needs, dtype, routed=routed)
