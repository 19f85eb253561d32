"""Pivoted storage of a low-rank matrix: `k(m+n-k)` numbers instead of `k(m+n)`.

In `W' = B A` any invertible `k x k` matrix can move between the factors. Choosing it so that `k`
rows of `B` become the identity removes these `k²` numbers: with pivot rows `I`,

    W'[I] = basis (k, n),      W'[rest] = coefficients (m-k, k) @ basis.

The coefficients depend on the column space alone, so the pivots are chosen on an orthonormal basis
`U` of it and not on `W'`: `coefficients = U[rest] U[I]⁻¹`, computed by triangular solves. The
entries of the coefficients bound how much rounding noise is amplified; pivoting by the largest
remaining row keeps them near one, and max-volume swaps (Goreinov et al., "How to find a good
submatrix", 2010) push the largest below a stated limit.

Pivoting factorization: arXiv 2501.19090. Its code pivots on `W'` in fp32 and takes the factors from
the half-precision model; here the pivots come from `U` in fp64, which is better conditioned. The
in-side form is the same thing applied to the transpose.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from spectrim.errors import NumericalError
from spectrim.tolerances import PIVOT_GROWTH_LIMIT, RANK_CUTOFF_FP64

Side = Literal["out", "in"]
Method = Literal["qr", "lu"]

_PANEL = 256
_SWAP_LIMIT = 100


@dataclass(frozen=True)
class Packed:
    """A rank-k matrix `W'` of shape (m, n) with its gauge fixed by pivots on one side.

    Side `out`: `W'[order] = [I; coefficients] @ basis`.
    Side `in`:  `W'[:, order] = basis @ [I, coefficients]`.

    Attributes:
        basis: (k, n) on the out-side, (m, k) on the in-side.
        coefficients: (m-k, k) on the out-side, (k, n-k) on the in-side.
        order: int32 permutation of the pivoted side, the k pivots first; both parts ascend.
        side: which side the pivots were chosen on.
    """

    basis: Tensor
    coefficients: Tensor
    order: Tensor
    side: Side

    @property
    def rank(self) -> int:
        """Number of pivots k."""
        return self.basis.shape[0 if self.side == "out" else 1]

    @property
    def growth(self) -> float:
        """Largest absolute coefficient: how far an entry of the basis can be amplified."""
        return float(self.coefficients.abs().amax()) if self.coefficients.numel() else 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the matrix."""
        rows, columns = self.basis.shape
        size = len(self.order)
        return (size, columns) if self.side == "out" else (rows, size)

    @property
    def numel(self) -> int:
        """Stored numbers, `k(m+n-k)`; the order comes on top."""
        return self.basis.numel() + self.coefficients.numel()

    def to(self, dtype: torch.dtype) -> Packed:
        """The same record with its parts rounded to `dtype`."""
        return replace(self, basis=self.basis.to(dtype), coefficients=self.coefficients.to(dtype))

    def factors(self) -> tuple[Tensor, Tensor]:
        """`up` (m, k) and `down` (k, n) with this product: the identity is written out again."""
        inverse = self.order.argsort()
        identity = torch.eye(self.rank).to(self.coefficients)
        if self.side == "out":
            return torch.cat([identity, self.coefficients])[inverse], self.basis
        return self.basis, torch.cat([identity, self.coefficients], dim=1)[:, inverse]

    def product(self) -> Tensor:
        """The dense (m, n) matrix in the dtype of the parts."""
        inverse = self.order.argsort()
        if self.side == "out":
            return torch.cat([self.basis, self.coefficients @ self.basis])[inverse]
        return torch.cat([self.basis, self.basis @ self.coefficients], dim=1)[:, inverse]


def packed_side(m: int, n: int) -> Side:
    """The side to pivot: the smaller one, `out` for a square matrix.

    There pivoting is cheaper, the permutation shorter, and the coefficients smaller, since fewer
    rows have to be written in terms of the same k pivots (5 to 12 % less rounding noise on
    2048 x 768 and 768 x 2048 matrices at half the parameters).
    """
    return "out" if m <= n else "in"


def pivot_rows(U: Tensor, *, method: Method = "qr", swaps: bool = True) -> Tensor:
    """Choose k rows of `U` that form a well-conditioned square block.

    Args:
        U: orthonormal columns, shape (m, k), k <= m; computed on in fp64.
        method: `qr` takes the pivots of a column-pivoted QR of `Uᵀ`; `lu` takes those of an LU
            with partial pivoting, a single library call with about 1.5 times the growth.
        swaps: improve the choice by max-volume swaps until no coefficient exceeds
            `tolerances.PIVOT_GROWTH_LIMIT` or 100 swaps were made.

    Returns:
        int64 permutation of the m rows, pivots first, both parts ascending.

    Raises:
        NumericalError: the columns of `U` are linearly dependent.
    """
    return _gauge(U.double(), method, swaps)[0]


def pack(
    up: Tensor,
    down: Tensor,
    *,
    side: Side | Literal["auto"] = "auto",
    method: Method = "qr",
    swaps: bool = True,
) -> Packed:
    """Rewrite `up @ down` with `k(m+n-k)` numbers, exactly up to fp64 rounding.

    Args:
        up: `B`, shape (m, k).
        down: `A`, shape (k, n).
        side: pivot on the rows of `up` (`out`) or the columns of `down` (`in`); `auto` is
            `packed_side`.
        method: see `pivot_rows`.
        swaps: see `pivot_rows`.

    Returns:
        The packed parts in fp64 on the device of `up`.

    Raises:
        ValueError: shapes do not fit, or k exceeds m or n.
    """
    (m, k), n = up.shape, down.shape[1]
    if down.shape[0] != k or not 1 <= k <= min(m, n):
        raise ValueError(
            f"up {tuple(up.shape)} and down {tuple(down.shape)} are not (m, k) and (k, n) "
            "with 1 <= k <= min(m, n)"
        )
    return _pack(up, down, packed_side(m, n) if side == "auto" else side, method, swaps)


def _pack(up: Tensor, down: Tensor, side: Side, method: Method, swaps: bool) -> Packed:
    if side == "in":
        p = _pack(down.mT, up.mT, "out", method, swaps)
        return Packed(p.basis.mT.contiguous(), p.coefficients.mT.contiguous(), p.order, "in")
    up, down = up.double(), down.double()
    order, coefficients = _gauge(torch.linalg.qr(up).Q, method, swaps)
    basis = up[order[: up.shape[1]]] @ down
    return Packed(basis, coefficients, order.to(torch.int32), "out")


def _gauge(U: Tensor, method: Method, swaps: bool) -> tuple[Tensor, Tensor]:
    """Pivot order and the coefficients (m-k, k) that belong to it."""
    m, k = U.shape
    if not 1 <= k <= m:
        raise ValueError(f"cannot choose {k} pivots among {m} rows")
    pivots = _cholesky_pivots(U) if method == "qr" else _lu_pivots(U)
    order = _order(pivots, m)
    coefficients = _coefficients(U, order)
    if swaps and m > k and _swap(coefficients, order):
        # The swaps update the coefficients by rank-one corrections; solve afresh so that their
        # rounding does not accumulate.
        order = _order(order[:k], m)
        coefficients = _coefficients(U, order)
    return order, coefficients


def _order(pivots: Tensor, m: int) -> Tensor:
    """Sorted pivots, then the other indices ascending: nearly sequential memory access."""
    rest = torch.ones(m, dtype=torch.bool, device=pivots.device)
    rest[pivots] = False
    return torch.cat([pivots.sort().values, rest.nonzero().flatten()])


def _coefficients(U: Tensor, order: Tensor) -> Tensor:
    """`U[rest] U[I]⁻¹` by two triangular solves."""
    k = U.shape[1]
    lu, pivots = torch.linalg.lu_factor(U[order[:k]])
    return torch.linalg.lu_solve(lu, pivots, U[order[k:]], left=False)


def _lu_pivots(U: Tensor) -> Tensor:
    k = U.shape[1]
    lu, swaps = torch.linalg.lu_factor(U)
    smallest, largest = lu.diagonal().abs().aminmax()
    if not smallest > RANK_CUTOFF_FP64 * largest:
        raise _dependent(k, float(smallest / largest))
    order = torch.lu_unpack(lu, swaps, unpack_data=False)[0].argmax(dim=0)
    return order[:k]


def _cholesky_pivots(U: Tensor) -> Tensor:
    """Pivots of the column-pivoted QR of `Uᵀ`, from the pivoted Cholesky of the projector `U Uᵀ`.

    Both pick the row with the largest part outside the span of the rows picked before. With the
    projector at hand a step costs one column (m) instead of a pass over all of `U`, and the rest
    is one matrix product per panel; an orthonormal `U` makes squaring it harmless.
    """
    m, k = U.shape
    rows = torch.arange(m, device=U.device)
    residual = U @ U.mT
    picked: list[Tensor] = []
    scale = residual.diagonal().amax()
    while len(picked) < k:
        width = min(_PANEL, k - len(picked))
        local, panel, smallest = _panel(residual, width)
        if not smallest > (RANK_CUTOFF_FP64 * scale):
            raise _dependent(k, float(smallest / scale))
        picked.extend(rows[local])
        keep = torch.ones(len(rows), dtype=torch.bool, device=U.device)
        keep[local] = False
        keep = keep.nonzero().flatten()
        rows, panel = rows[keep], panel[keep]
        residual = residual.index_select(0, keep).index_select(1, keep)
        residual.addmm_(panel, panel.mT, alpha=-1.0)
    return torch.stack(picked)


def _panel(residual: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The next `width` pivots, their Cholesky columns, and the smallest pivot value."""
    remaining = residual.diagonal().clone()
    panel = residual.new_zeros(residual.shape[0], width)
    local, values = [], []
    for j in range(width):
        p = remaining.argmax()
        value = remaining[p].clone()
        column = residual[p] - panel[:, :j] @ panel[p, :j]
        column /= value.sqrt()
        remaining.addcmul_(column, column, value=-1.0)
        remaining[p] = -torch.inf
        panel[:, j] = column
        local.append(p)
        values.append(value)
    return torch.stack(local), panel, torch.stack(values).amin()


def _swap(coefficients: Tensor, order: Tensor) -> int:
    """Exchange pivots while a coefficient exceeds the limit; updates both arguments in place.

    Exchanging pivot j with row i multiplies the volume of the pivot block by `|c_ij|`, so the
    loop ends. Returns the number of swaps.
    """
    k = coefficients.shape[1]
    for done in range(_SWAP_LIMIT):
        i, j = divmod(int(coefficients.abs().argmax()), k)
        c = float(coefficients[i, j])
        if abs(c) <= PIVOT_GROWTH_LIMIT:
            return done
        row, column = coefficients[i].clone(), coefficients[:, j].clone()
        row[j] -= 1.0
        coefficients.addr_(column, row, alpha=-1.0 / c)
        # Row i now describes the old pivot j: e_j minus the same correction.
        coefficients[i] = row / -c
        coefficients[i, j] += 1.0
        order[[j, k + i]] = order[[k + i, j]]
    return _SWAP_LIMIT


def _dependent(k: int, share: float) -> NumericalError:
    return NumericalError(
        f"cannot choose {k} independent pivot rows: the smallest pivot is {share:.1e} of the "
        "largest row; orthonormalise the factor first"
    )
