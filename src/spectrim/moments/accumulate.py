"""Streaming sums for one group: every batch of inputs is reduced to second moments on the spot."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from spectrim.devices import HOST, in_tf32
from spectrim.distributed.team import Team
from spectrim.errors import NonFiniteError
from spectrim.model.anatomy import Group
from spectrim.moments.moments import Moments
from spectrim.moments.symmetric import SymmetricSum, parts_of, reduction_dtype


class MomentAccumulator:
    """Sums `x xᵀ` and its relatives over batches for one group.

    The tokens of an expert wait until there are as many as half the width of the input: an expert
    that sees fewer has no sums of that size, and products are of more than a few tokens.

    Args:
        name: the group's name in error messages.
        needs: which of `C`, `shifted`, `cross`, `absolute`, `deficit` to accumulate; the square
            goes with a deficit.
        dtype: of the sums; fp64 inputs are always summed in fp64.
        routed: no tokens (0, in) of an expert's group, as it would see them, or None for what all
            tokens pass. Rows of zeros, which some models send to experts that were not chosen,
            are no tokens.
    """

    def __init__(
        self,
        name: str,
        needs: Collection[str],
        dtype: torch.dtype = torch.float64,
        *,
        routed: Tensor | None = None,
    ):
        self.name = name
        self.routed = routed
        self.needs = frozenset(needs)
        self.dtype = dtype
        self.tokens = 0
        self.sums: dict[str, Tensor] = {}
        self.squares: dict[str, SymmetricSum] = {}
        self._waiting: tuple[list[Tensor], list[Tensor]] = [], []

    def add(
        self, x: Tensor | None, shifted: Tensor | None = None, deficit: Tensor | None = None
    ) -> None:
        """Add one batch of inputs, (tokens, in) or (..., in); both streams hold the same tokens.

        `deficit` (..., out) is what the residual stream lacks at these tokens.

        Raises:
            NonFiniteError: an input holds NaN or infinity; the message names the group.
        """
        x = None if x is None else self._rows(x, "input")
        shifted = None if shifted is None else self._rows(shifted, "shifted input")
        reference = x if x is not None else shifted
        if reference is None:
            raise ValueError("a batch needs at least one stream")
        if self.routed is None:
            self.tokens += reference.shape[0]
            self._sum(x, shifted)
            if deficit is not None and shifted is not None:
                deficit = self._rows(deficit, "residual")
                self._square("deficit", deficit)
                self._products("deficit", deficit, shifted)
            return
        seen = reference.any(1)
        self.tokens += int(seen.sum())
        for waiting, rows in zip(self._waiting, (x, shifted), strict=True):
            if rows is not None:
                waiting.append(rows[seen])
        if 2 * max(sum(map(len, waiting)) for waiting in self._waiting) >= reference.shape[1]:
            self._settle()

    def _settle(self) -> None:
        """Sum what waits."""
        if any(self._waiting):
            waited, self._waiting = self._waited(), ([], [])
            self._sum(*waited)

    def _waited(self) -> tuple[Tensor | None, Tensor | None]:
        """Rows of both streams that are in no sum yet, (0, in) if an expert saw nothing."""
        if not self.tokens:
            original = self.needs & {"C", "cross", "absolute"}
            shifted = self.needs & {"shifted", "cross"}
            return self.routed if original else None, self.routed if shifted else None
        x, shifted = (torch.cat(rows) if rows else None for rows in self._waiting)
        return x, shifted

    def _sum(self, x: Tensor | None, shifted: Tensor | None) -> None:
        self._square("C", x)
        self._square("shifted", shifted)
        self._products("cross", x, shifted)
        if x is not None and "absolute" in self.needs:
            self._accumulate("absolute", x.abs().sum(0, dtype=reduction_dtype(x)))

    def _square(self, key: str, rows: Tensor | None) -> None:
        if key not in self.needs or rows is None:
            return
        if key not in self.squares:
            wide = torch.promote_types(self.dtype, reduction_dtype(rows))
            self.squares[key] = SymmetricSum(rows.shape[1], wide, rows.device)
        self.squares[key].add(rows)

    def _products(self, key: str, left: Tensor | None, right: Tensor | None) -> None:
        if key not in self.needs or left is None or right is None:
            return
        exact = left.dtype.itemsize == right.dtype.itemsize == 2
        for a, b in zip(parts_of(left), parts_of(right), strict=True):
            with in_tf32(left.device, exact):
                product = a.mT @ b
            self._accumulate(key, product)

    def _rows(self, x: Tensor, what: str) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1])
        # A sum is not finite if one value is not, and takes a tenth of the time of looking at all.
        if not math.isfinite(float(rows.sum(dtype=reduction_dtype(x)))):
            raise NonFiniteError(
                f"non-finite {what} at {self.name}: the model overflows on this text in its dtype; "
                "try --dtype float32 or other calibration text"
            )
        return rows

    def _accumulate(self, key: str, value: Tensor) -> None:
        if key in self.sums:
            self.sums[key] += value
        else:
            self.sums[key] = value.to(torch.promote_types(self.dtype, value.dtype))

    def reduce(self, team: Team) -> None:
        """Add the sums of all processes, the same bits on each; collective.

        Where this process saw no window its sums must be zeros, not missing.
        """
        if team.size == 1:
            return
        if self.routed is not None and not self.tokens:
            self._sum(*self._waited())
        self._settle()
        numbers = torch.tensor([self.tokens])
        panels = [p for key in sorted(self.squares) for p in self.squares[key].panels]
        team.sum_([*panels, *(self.sums[key] for key in sorted(self.sums)), numbers])
        self.tokens = int(numbers)

    def moments(self) -> Moments:
        """The sums so far, fp64."""
        if self.routed is not None and not self.sums and not self.squares:
            # Not kept: the next expert's turn comes.
            alone = MomentAccumulator(self.name, self.needs, self.dtype)
            alone.tokens = self.tokens
            alone._sum(*self._waited())
            return alone._whole()
        self._settle()
        return self._whole()

    def _whole(self) -> Moments:
        squares = {key: found.whole() for key, found in self.squares.items()}
        sums = {key: found.double() for key, found in self.sums.items()}
        return Moments(
            tokens=self.tokens,
            C=squares.get("C"),
            shifted=squares.get("shifted"),
            cross=sums.get("cross"),
            absolute=sums.get("absolute"),
            deficit=sums.get("deficit"),
            deficit_square=squares.get("deficit"),
        )


def accumulator_of(
    group: Group,
    needs: Collection[str],
    *,
    dense: torch.dtype = torch.float64,
    like: torch.dtype = torch.float32,
    device: torch.device | str = HOST,
) -> MomentAccumulator:
    """Sums for a group under the name of its first target.

    Args:
        group: an expert's or one that every token passes.
        needs: see `MomentAccumulator`.
        dense: dtype of the sums of a group that every token passes.
        like: of an expert's, which sees few tokens: fp32 unless the model is wider.
        device: of the inputs.
    """
    name = group.targets[0].name
    if group.expert is None:
        return MomentAccumulator(name, needs, dense)
    nothing = torch.zeros(0, group.in_features, dtype=like, device=device)
    return MomentAccumulator(name, needs, like, routed=nothing)
