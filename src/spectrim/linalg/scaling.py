"""How large the rows and columns of a matrix are, whatever units they are written in.

The squares `W_ij²` are brought to equal sums of rows and of columns by positive factors,
`Σ_j r_i W_ij² c_j` and `Σ_i r_i W_ij² c_j` (Sinkhorn and Knopp, Pacific J. Math. 21, 1967). Writing
`W` as `diag(f) W diag(1/d)` multiplies `r_i` by `1/f_i²` and `c_j` by `d_j²`, and nothing else:
`1/r` and `1/c` are sizes of rows and columns of which neither depends on the units of the other,
as plain norms do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectrim.tolerances import SCALING

STEPS = 100
"""A dense matrix needs about ten; one with a pattern of zeros may never come to rest."""


def row_and_column_sizes(W: Tensor) -> tuple[Tensor, Tensor]:
    """Squared sizes of the rows (m,) and columns (n,) of a matrix (m, n), up to a common factor.

    Rows and columns of zeros have size 0.
    """
    squares = W.to(torch.float64).square()
    # Columns first, by their own sums: what they are written in cancels from the first step on.
    columns = squares.sum(0)
    rows = squares.new_zeros(len(squares))
    for _ in range(STEPS):
        before = rows
        rows = squares @ _inverse(columns)
        rows = rows / rows.mean().clamp_min(torch.finfo(rows.dtype).tiny)
        columns = squares.mT @ _inverse(rows)
        if bool(((rows - before).abs() <= SCALING * rows).all()):
            break
    return rows, columns


def _inverse(sizes: Tensor) -> Tensor:
    """Elementwise, 0 where there is nothing."""
    return torch.where(sizes > 0, 1 / torch.where(sizes > 0, sizes, 1.0), 0.0)
