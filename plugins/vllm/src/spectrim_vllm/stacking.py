"""Several layers that share an input as one product and a few small ones, sharded over ranks.

vLLM fuses q, k, v (and gate, up) into one layer. Each of these *pieces* may be stored as

    factored   y = B (A x)       A = down (r, n), B = up (m, r); every piece has its own r
    packed     the same, with the identity among the rows of B or the columns of A
    dense      y = W x           W (m, n)

and all of them begin with a product with x. The first matrices are stacked, `first` =
[A_q; A_k; W_v] (rows, n): one product for the whole layer. A piece with factors then multiplies
its own rows of the result with its `up`; a dense piece is finished.

Tensor parallelism over T ranks:

    column-parallel   outputs are split. A is replicated, the rows of B and of W are sharded.
    row-parallel      inputs are split. The columns of A and of W are sharded, B is replicated.
                      Rank t computes B (A_t x_t), and vLLM adds the ranks up:
                      Σ_t B A_t x_t = B (Σ_t A_t x_t) = B A x. The sum is exact because B is linear
                      and the same everywhere; only the order of additions differs from one rank.

Plain torch; nothing here knows vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from spectrim.errors import ModelError
from spectrim.layers.layout import layout_of

__all__ = ["Piece", "Place", "Stack"]


@dataclass(frozen=True)
class Place:
    """Where a rank stands.

    Attributes:
        rank: its number, 0 to `ranks - 1`.
        ranks: how many share the layer.
        splits: what is split, `out` for column-parallel and `in` for row-parallel layers.
    """

    rank: int
    ranks: int
    splits: str

    def __post_init__(self):
        if self.splits not in ("in", "out") or not 0 <= self.rank < self.ranks:
            raise ValueError(f"{self} is no place of a tensor-parallel layer")


@dataclass(frozen=True)
class Piece:
    """One layer of the checkpoint inside a layer of vLLM.

    Attributes:
        name: in the checkpoint, relative to the base model.
        rank: components; None for a dense piece.
        storage: `factored`, `packed`, `dense` or `residual`.
        outputs: rows that one rank computes, by the parts that vLLM shards separately. A piece
            that is fused in the checkpoint already (a stored `qkv_proj`) has several.
        weights: number formats of its parts.
        shape: (out, in) as stored, where it has coded weights.
    """

    name: str
    rank: int | None
    storage: str
    outputs: tuple[int, ...]
    weights: str = "native"
    shape: tuple[int, int] | None = None

    @property
    def out_features(self) -> int:
        """Rows that one rank computes."""
        return sum(self.outputs)

    @property
    def up_rank(self) -> int | None:
        """Columns of the up matrix; None where one matrix of all outputs serves the piece."""
        return None if layout_of(self.storage).whole else self.rank

    @property
    def rows(self) -> int:
        """Rows of the stacked matrix."""
        return self.out_features if self.up_rank is None else self.up_rank

    def own_rows(self, full: int, place: Place) -> list[tuple[int, int]]:
        """(start, length) of the rows of a stored (full, ...) matrix that this rank computes.

        A layer with fewer parts than ranks (key-value heads at high parallelism) is repeated:
        neighbouring ranks then hold the same rows, as vLLM shards such heads itself.

        Raises:
            ModelError: the stored rows cannot be dealt out to the ranks.
        """
        ranks = place.ranks if place.splits == "out" else 1
        if len(self.outputs) > 1:
            if full != ranks * self.out_features:
                raise self._cannot_deal(full, ranks)
            starts = accumulate((ranks * size for size in self.outputs), initial=0)
            index = place.rank if ranks > 1 else 0
            return [
                (start + index * size, size)
                for start, size in zip(starts, self.outputs, strict=False)
            ]
        (size,) = self.outputs
        distinct, rest = divmod(full, size)
        if rest or not distinct or ranks % distinct:
            raise self._cannot_deal(full, ranks)
        index = place.rank // (ranks // distinct) if ranks > 1 else 0
        return [(index * size, size)]

    def _cannot_deal(self, full: int, ranks: int) -> ModelError:
        return ModelError(
            f"{self.name} has {full} outputs, which cannot be dealt to {ranks} ranks that compute "
            f"{' + '.join(map(str, self.outputs))} each; choose another tensor_parallel_size"
        )


@dataclass(frozen=True)
class Stack:
    """The pieces of one layer of vLLM, in the order of its outputs.

    Attributes:
        pieces: in order.
        in_features: inputs that one rank reads.
        place: of this rank.
    """

    pieces: tuple[Piece, ...]
    in_features: int
    place: Place

    @property
    def rows(self) -> int:
        """Rows of the stacked first matrix."""
        return sum(piece.rows for piece in self.pieces)

    @property
    def up_numbers(self) -> int:
        """Numbers of all up matrices, which lie one behind the other in one vector."""
        return sum(self._up_size(piece) for piece in self.pieces)

    @staticmethod
    def _up_size(piece: Piece) -> int:
        return 0 if piece.up_rank is None else piece.out_features * piece.up_rank

    def first_rows(self, index: int) -> slice:
        """The rows of piece `index` in the stacked matrix."""
        start = sum(piece.rows for piece in self.pieces[:index])
        return slice(start, start + self.pieces[index].rows)

    def up_of(self, ups: Tensor, index: int) -> Tensor:
        """The up matrix (outputs, rank) of piece `index`, a view of the vector of all."""
        piece = self.pieces[index]
        if piece.up_rank is None:
            raise ValueError(f"{piece.name} is one matrix and has no up matrix")
        start = sum(self._up_size(p) for p in self.pieces[:index])
        flat = ups[start : start + self._up_size(piece)]
        return flat.view(piece.out_features, piece.up_rank)

    def ups_of(self, ups: Tensor) -> list[Tensor | None]:
        """The up matrix of every piece, None for one without."""
        whole = [piece.up_rank is None for piece in self.pieces]
        return [None if one else self.up_of(ups, i) for i, one in enumerate(whole)]

    def own_inputs(self, full: Tensor) -> Tensor:
        """The columns of a stored (rows, n) matrix that this rank reads.

        Raises:
            ModelError: the stored columns are not those of all ranks together.
        """
        split = self.place.splits == "in"
        expected = self.in_features * (self.place.ranks if split else 1)
        if full.shape[1] != expected:
            raise ModelError(
                f"{self.pieces[0].name} reads {full.shape[1]} features in the checkpoint, "
                f"{expected} in vLLM"
            )
        start = self.in_features * self.place.rank if split else 0
        return full[:, start : start + self.in_features]

    def write(
        self, index: int, first: Tensor, ups: Tensor, down: Tensor, up: Tensor | None
    ) -> None:
        """Put this rank's share of one piece into the stacked tensors.

        Args:
            index: of the piece.
            first: the stacked matrix (rows, in_features), written to.
            ups: the vector of up matrices, written to.
            down: `A` (r, n) as stored, or `W` (m, n) of a dense piece.
            up: `B` (m, r) as stored, None for a dense piece.
        """
        piece = self.pieces[index]
        down = self.own_inputs(down)
        if up is None:
            down = _rows(down, piece.own_rows(down.shape[0], self.place))
        first[self.first_rows(index)].copy_(down)
        if up is not None:
            own = piece.own_rows(up.shape[0], self.place)
            self.up_of(ups, index).copy_(_rows(up, own))

    def forward(
        self,
        x: Tensor,
        first: Any,
        ups: Sequence[Any],
        bias: Tensor | None,
        multiply: Callable[[Tensor, Any], Tensor] = torch.nn.functional.linear,
    ) -> Tensor:
        """(..., in_features) -> (..., sum of outputs): one product, then one per piece.

        Args:
            x: inputs.
            first: the stacked matrix, as `multiply` takes it.
            ups: the up matrix of every piece, None for a dense one.
            bias: (sum of outputs,) or None.
            multiply: (..., columns) and a matrix (rows, columns) -> (..., rows).
        """
        z = multiply(x, first)
        results = []
        for index, up in enumerate(ups):
            own = z if len(ups) == 1 else z[..., self.first_rows(index)]
            results.append(own if up is None else multiply(own, up))
        y = results[0] if len(results) == 1 else torch.cat(results, dim=-1)
        return y if bias is None else y + bias


def _rows(matrix: Tensor, places: Sequence[tuple[int, int]]) -> Tensor:
    parts = [matrix[start : start + size] for start, size in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
