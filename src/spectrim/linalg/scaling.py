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

_LOOK = 4
"""Steps between two looks at whether they have come to rest: an accelerator waits for a look."""


def row_and_column_sizes(W: Tensor) -> tuple[Tensor, Tensor]:
    """Squared sizes of the rows (m,) and columns (n,) of a matrix (m, n), up to a common factor.

    Rows and columns of zeros have size 0.
    """
    squares = W.to(torch.float64).square()
    # Columns first, by their own sums: what they are written in cancels from the first step on.
    columns = squares.sum(0)
    rows = squares.new_zeros(len(squares))
    # Where rows sum to one, columns sum to one over this, or the common factor would wander.
    filled = [squares.any(d).sum(dtype=squares.dtype) for d in (0, 1)]
    share = filled[0] / filled[1].clamp_min(1)
    for step in range(STEPS):
        before = rows
        rows = squares @ _inverse(columns)
        columns = share * (squares.mT @ _inverse(rows))
        if step % _LOOK == _LOOK - 1 and bool(((rows - before).abs() <= SCALING * rows).all()):
            break
    size = rows.mean().clamp_min(torch.finfo(rows.dtype).tiny)
    return rows / size, columns * size


def _inverse(sizes: Tensor) -> Tensor:
    """Elementwise, a finite number where there is nothing: it is multiplied with zeros alone."""
    return sizes.clamp_min(torch.finfo(sizes.dtype).tiny).reciprocal()
