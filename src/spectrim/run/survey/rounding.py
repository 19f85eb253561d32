"""What every form would round away of one target, predicted from its moments before any plan.

With the moments `C` of the inputs and `G` of the output gradients an error E costs
`½ tr(G E C Eᵀ)` nats per token. For dense forms the matrix is rounded as it would be stored and the
error measured. For factored ones the survey's components have `BᵀGB = I` and `A C Aᵀ = diag(s²)`:
the rows of A can be rounded and judged one by one, and an error of column i of B costs `½ s_i²`
times its square in G. One rounding per format therefore gives the loss at every rank. A residual is
predicted as its layer begins: the base rounds what the leading components leave, and the factors
are solved for again behind it, which one step of subspace iteration does to three digits. What 8
bits take from them, and what further turns give, are of one size and left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from spectrim.allocate.forms import Form
from spectrim.decompose.decomposition import Decomposition
from spectrim.decompose.kfac import output_root
from spectrim.decompose.statistics import tokens_of
from spectrim.formats import NumberFormat, formats_of
from spectrim.formats.number_format import Coded
from spectrim.linalg.psd import shrunk
from spectrim.linalg.rounding import Grid, Metric
from spectrim.linalg.scaling import row_and_column_sizes
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.recipe import Decompose


def rounding_losses(
    name: str,
    W: Tensor,
    whole: Decomposition,
    moments: Moments,
    output: OutputMoments,
    choice: Decompose,
    forms: Iterable[Form],
) -> dict[str, Tensor]:
    """`Form.key` -> loss that rounding adds, nats per token: (r + 1,) by rank, dense forms (1,).

    Args:
        name: the target, for messages.
        W: its weight, (out, in).
        whole: all components for the objective kfac.
        moments: of the inputs, must hold `C`.
        output: must hold `G`.
        choice: how the moments were shrunk.
        forms: those with codes are judged.

    Raises:
        NotPositiveDefiniteError, NonFiniteError, NumericalError: see `Metric.of`.
    """
    assert moments.C is not None
    W = W.double()
    C = moments.C / tokens_of(moments)
    rows, columns = row_and_column_sizes(W)
    root = output_root(output, rows, choice.shrink_out, name=name)
    if root is None or not C.any():
        return {}  # nothing is at stake here, and shares of nothing are as good
    L, _ = root
    C, G = shrunk(C, choice.shrink_in, columns), L @ L.mT
    metric = Metric.of(moments.C, name=name, sizes=columns)
    forms = [form for form in forms if form.coded]
    whole_forms = [form for form in forms if form.whole and not form.low_rank]
    errors = _errors(W, [_row(form.weights) for form in whole_forms], metric)
    # In fp32: these are predictions, and sums of products without cancellation.
    G32, C32 = G.float(), C.float()
    losses = {
        form.key: 0.5 * ((G32 @ E) * (E @ C32)).sum(dtype=torch.float64)[None]
        for form, E in ((f, e.float()) for f, e in zip(whole_forms, errors, strict=True))
    }
    residuals = [form for form in forms if form.low_rank and form.whole]
    losses |= _left_by_residuals(W, whole, C, L, metric, residuals)
    pairs = {form.key: formats_of(form.weights, 2) for form in forms if not form.whole}
    formats = list({down.name: down for _, down in pairs.values()}.values())
    downs = {
        row.name: 0.5 * ((E @ C) * E).sum(dim=1)
        for row, E in zip(formats, _errors(whole.down, formats, metric), strict=True)
    }
    ups = {up.name: _columns_lost(whole, G, up) for up, _ in pairs.values()}
    for key, (up, down) in pairs.items():
        added = downs[down.name] + ups[up.name]
        losses[key] = torch.cat([added.new_zeros(1), added.cumsum(0)])
    return losses


def _left_by_residuals(
    W: Tensor, whole: Decomposition, C: Tensor, L: Tensor, metric: Metric, forms: Sequence[Form]
) -> dict[str, Tensor]:
    """`Form.key` -> loss by rank, (r + 1,): at ranks between those offered, that of the one below.

    Args:
        W: fp64, (out, in).
        whole: all components of W for the objective kfac.
        C: of the inputs, per token.
        L: lower, `G = L Lᵀ`.
        metric: of the inputs, for rounding.
        forms: residuals.
    """
    losses = {form.key: W.new_zeros(whole.energy.numel() + 1) for form in forms}
    rows = [_row(form.base) for form in forms]
    C32, L32 = C.float(), L.float()
    for rank in dict.fromkeys(k for form in forms for k in form.ranks(whole.rank)):
        up, down = whole.cut(rank)
        taken = up @ down
        for form, E in zip(forms, _errors(W - taken, rows, metric), strict=True):
            P = L32.mT @ (taken - E).float()
            seen = P @ C32
            U, _ = torch.linalg.qr(seen @ (P.mT @ (L32.mT @ up.float())))
            caught = ((U.mT @ P) * (U.mT @ seen)).sum(dtype=torch.float64)
            losses[form.key][rank:] = 0.5 * ((P * seen).sum(dtype=torch.float64) - caught)
    return losses


def _row(weights: str) -> NumberFormat:
    return formats_of(weights, 1)[0]


def _errors(W: Tensor, rows: Sequence[NumberFormat], metric: Metric) -> list[Tensor]:
    """What rounding with feedback leaves of a matrix in each of some formats."""
    found: dict[str, Tensor] = {}
    for integer in (True, False):  # what one pass rounds has one kind of code
        alike = [row for row in rows if row.integer is integer]
        if alike:
            every = Grid.stacked([_grid(W, row, metric.importance) for row in alike])
            repeated = W.repeat(len(alike), 1)
            E = every.values(metric.codes(repeated, every), dtype=torch.float64) - repeated
            found |= zip((row.name for row in alike), E.split(W.shape[0]), strict=True)
    return [found[row.name] for row in rows]


def _grid(W: Tensor, row: NumberFormat, importance: Tensor) -> Grid:
    assert isinstance(row, Coded)
    return row.grid(row.scales(W, importance), W.shape[1])


def _columns_lost(whole: Decomposition, G: Tensor, row: NumberFormat) -> Tensor:
    """Loss of rounding `up` to a format, by column, (r,)."""
    # The mean size of a component's value is its metric: nothing is passed on between columns.
    grid = _grid(whole.up, row, whole.energy.clamp_min(torch.finfo(torch.float64).tiny))
    E = grid.values(grid.codes(whole.up), dtype=torch.float64) - whole.up
    return whole.energy * ((G @ E) * E).sum(dim=0)
