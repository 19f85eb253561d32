"""Laws of rounding with feedback, against the definition of its metric and against nearest."""

import pytest
import torch

from spectrim.errors import NonFiniteError
from spectrim.linalg.rounding import COLUMNS, Grid, Metric
from spectrim.linalg.scaling import row_and_column_sizes


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n, seed=0, decay=2.0):
    """Correlated inputs with second moments over some orders of magnitude."""
    mixing = draw(n, n, seed=seed) * torch.logspace(0, -decay, n, dtype=torch.float64)
    X = mixing @ draw(n, 6 * n, seed=seed + 1)
    return X @ X.mT


def grid(m, n, step=0.3, offset=None):
    steps = torch.full((m, n), step, dtype=torch.float64)
    return Grid(steps, offset, -8, 7)


@pytest.mark.parametrize("n", [5, COLUMNS, 2 * COLUMNS + 7])
def test_the_loss_is_the_sum_of_what_the_columns_leave(n):
    metric = Metric.of(moment(n), name="t")
    W = draw(9, n, seed=3)
    g = grid(9, n)
    E = g.values(metric.codes(W, g), dtype=torch.float64) - W
    ordered = E[:, metric.order]
    eta = ordered @ metric.N
    damped = metric.N * metric.d @ metric.N.mT
    direct = ((ordered @ damped) * ordered).sum(1)
    assert torch.allclose((eta.square() * metric.d).sum(1), direct, rtol=1e-9)
    # Inside the range no column leaves more than half a step, whatever the others did.
    inside = (W.abs() < 1.2).all()
    assert not inside or (eta.abs() <= 0.15 + 1e-9).all()


@pytest.mark.parametrize("seed", range(4))
def test_feedback_beats_nearest_and_is_nearest_without_correlation(seed):
    n = 48
    W, g = draw(16, n, seed=seed), grid(16, n)
    C = moment(n, seed=seed + 10)
    metric = Metric.of(C, name="t")
    shaped = g.values(metric.codes(W, g), dtype=torch.float64) - W
    nearest = g.values(g.codes(W), dtype=torch.float64) - W
    assert metric.loss(shaped).sum() < 0.7 * metric.loss(nearest).sum()
    alone = Metric.of(torch.diag(C.diagonal()), name="t")
    assert torch.equal(alone.codes(W, g), g.codes(W))


@pytest.mark.parametrize("seed", range(3))
def test_feedback_on_the_numbers_of_float8_loses_less_than_the_nearest_ones(seed):
    n = COLUMNS + 9
    W = draw(12, n, seed=seed)
    g = Grid((W.abs().amax(dim=1, keepdim=True) / 448).expand(-1, n), None, -448, 448, float8=True)
    C = moment(n, seed=seed + 10)
    metric = Metric.of(C, name="t")
    codes = metric.codes(W, g)
    assert torch.equal(codes, codes.to(torch.float8_e4m3fn).float())
    shaped, nearest = (g.values(c, dtype=torch.float64) - W for c in (codes, g.codes(W)))
    assert metric.loss(shaped).sum() < 0.7 * metric.loss(nearest).sum()
    alone = Metric.of(torch.diag(C.diagonal()), name="t").codes(W, g)
    assert (alone != g.codes(W)).double().mean() < 1e-3  # halves, met in fp32


def test_rescaled_channels_are_rounded_alike():
    """Inputs times s, columns and steps over s: the same codes."""
    n = 40
    C, W = moment(n), draw(6, n, seed=2)
    scales = torch.logspace(-3, 3, n, dtype=torch.float64)[
        torch.randperm(n, generator=torch.Generator().manual_seed(1))
    ]
    g = grid(6, n)
    first = Metric.of(C, name="t")
    # The order of the columns may change with their scales; damping must not.
    second = Metric.of(scales[:, None] * C * scales, name="t")
    assert torch.allclose(
        (first.N * first.d @ first.N.mT).diagonal()[first.order.argsort()],
        (second.N * second.d @ second.N.mT).diagonal()[second.order.argsort()] / scales.square(),
        rtol=1e-9,
    )
    kept = Metric(C, second.order, torch.eye(n).double(), second.d)
    rescaled = Grid(g.step / scales, None, g.low, g.high)
    assert torch.equal(kept.codes(W, g), kept.codes(W / scales, rescaled))


def test_offsets_zero_steps_and_unseen_channels():
    n = 24
    C = moment(n)
    C[3], C[:, 3] = 0.0, 0.0
    metric = Metric.of(C, name="t")
    g = grid(5, n, offset=draw(5, n, seed=7))
    g.step[2] = 0.0
    W = draw(5, n, seed=8)
    found = g.values(metric.codes(W, g), dtype=torch.float64)
    assert torch.equal(found[2], g.offset[2])
    assert (found - W)[[0, 1, 3, 4], 3].abs().max() <= 2.5
    bad = C.clone()
    bad[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="layer7"):
        Metric.of(bad, name="layer7")


def test_stacked_grids_round_as_each_alone():
    n = COLUMNS + 5
    metric, W = Metric.of(moment(n), name="t"), draw(4, n)
    coarse = Grid(torch.full((4, n), 0.9, dtype=torch.float64), None, -2, 1)
    fine = grid(4, n)
    both = metric.codes(W.repeat(2, 1), Grid.stacked([coarse, fine]))
    assert torch.equal(both, torch.cat([metric.codes(W, coarse), metric.codes(W, fine)]))


def test_a_channel_that_others_predict_does_not_take_up_all_errors():
    # Two channels that are one and a little noise: without the prior the second rounds away what
    # the first cannot hold, by many of its own steps, and other tokens pay for it.
    n = 24
    base = draw(4096, n)
    base[:, 1] = 20 * base[:, 0] + 1e-4 * base[:, 1]
    C = base.mT @ base / len(base)
    W = draw(16, n)
    columns = row_and_column_sizes(W)[1]
    g = Grid(torch.full((16, n), 0.02, dtype=torch.float64), None, -127, 127)
    plain, calm = Metric.of(C, name="t"), Metric.of(C, name="t", sizes=columns)
    errors = [g.values(m.codes(W, g), dtype=torch.float64) - W for m in (plain, calm)]
    assert torch.equal(calm.C, plain.C)
    assert errors[1].norm() < errors[0].norm()
    assert calm.loss(errors[1]).sum() < 1.2 * plain.loss(errors[0]).sum()
