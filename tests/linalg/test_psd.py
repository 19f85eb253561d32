"""Moment matrices: roots on the numerical range and damping that is recorded."""

import pytest
import torch

from spectrim.errors import NonFiniteError, NotPositiveDefiniteError, NumericalError
from spectrim.linalg.psd import (
    channel_prior,
    cholesky_damped,
    shrunk,
    symmetrized,
)
from spectrim.tolerances import DAMPING_LIMIT, DAMPING_START


def gram(width, tokens, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    x = scale * torch.randn(width, tokens, generator=g, dtype=torch.float64)
    return x @ x.T


def test_definite_matrices_are_not_damped():
    C = gram(6, 40, scale=1e-9)
    L, damping = cholesky_damped(C, name="layer")
    assert damping == 0
    assert torch.allclose(L @ L.T, C, rtol=1e-10, atol=0)


def test_pivots_are_judged_on_their_own_scale():
    C = torch.tensor([1.0, 1e-30], dtype=torch.float64).diag()
    assert cholesky_damped(C, name="layer")[1] == 0


def test_a_factor_that_exists_by_luck_of_rounding_is_damped():
    C = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2.0**-52]], dtype=torch.float64)
    assert int(torch.linalg.cholesky_ex(C).info) == 0
    assert cholesky_damped(C, name="layer")[1] == pytest.approx(DAMPING_START)


@pytest.mark.parametrize("singular", ["few tokens", "dead channel", "duplicate channel"])
def test_singular_matrices_get_the_least_damping_that_works(singular):
    C = gram(6, 4 if singular == "few tokens" else 40)
    if singular == "dead channel":
        C[2] = C[:, 2] = 0
    if singular == "duplicate channel":
        C[2] = C[4]
        C[:, 2] = C[:, 4]
    L, damping = cholesky_damped(C, name="layer")
    assert damping == pytest.approx(DAMPING_START)
    damped = C + damping * C.diagonal().mean() * torch.eye(6, dtype=C.dtype)
    assert torch.allclose(L @ L.T, damped, atol=1e-12)


def test_ridge_is_where_damping_begins():
    C = gram(6, 40)
    assert cholesky_damped(C, name="layer", ridge=1e-6)[1] == 1e-6
    almost = C - 1.00001 * torch.linalg.eigvalsh(C)[0] * torch.eye(6, dtype=C.dtype)
    damping = cholesky_damped(almost, name="layer", ridge=1e-9)[1]
    assert 1e-9 < damping <= DAMPING_LIMIT


@pytest.mark.parametrize("C", [-torch.eye(3), torch.zeros(3, 3), torch.tensor([1.0, -0.5]).diag()])
def test_indefinite_matrices_end_in_an_error_that_names_the_layer(C):
    with pytest.raises(NotPositiveDefiniteError, match=r"blocks\.7\.down"):
        cholesky_damped(C, name="blocks.7.down")


def test_untrustworthy_matrices_are_refused():
    with pytest.raises(NonFiniteError, match="layer"):
        symmetrized(torch.full((2, 2), float("nan")), name="layer")
    with pytest.raises(NumericalError, match="transpose"):
        symmetrized(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), name="layer")
    with pytest.raises(ValueError, match="square"):
        symmetrized(torch.ones(2, 3), name="layer")


def test_single_precision_sums_are_symmetric_enough():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 64, generator=g) * torch.logspace(-3, 3, 64)
    C = x.T @ x
    C[3, 5] *= 1 + 1e-6
    assert torch.equal(symmetrized(C, name="layer"), symmetrized(C, name="layer").T)


def test_shrinkage_gives_every_channel_the_mean_worth_and_keeps_the_input():
    C, sizes = gram(5, 9), torch.tensor([1.0, 4.0, 0.25, 9.0, 1.0]).double()
    before = C.clone()
    mixed = shrunk(C, 0.3, sizes)
    assert torch.equal(C, before)
    assert float(mixed.diagonal() @ sizes) == pytest.approx(float(C.diagonal() @ sizes))
    worth = shrunk(C, 1.0, sizes).diagonal() * sizes
    assert torch.allclose(worth, worth.mean().expand(5))
    ones = torch.ones(5)
    assert torch.allclose(shrunk(C, 1.0, ones), C.diagonal().mean() * torch.eye(5, dtype=C.dtype))
    with pytest.raises(ValueError, match="shrinkage"):
        shrunk(C, 1.5, ones)


def test_the_prior_follows_rescaled_channels_and_leaves_out_those_that_nobody_reads():
    C, sizes = gram(5, 9), torch.tensor([1.0, 4.0, 0.0, 9.0, 1.0]).double()
    d = torch.tensor([2.0**9, 1.0, 4.0, 0.5, 2.0**-7]).double()
    prior = channel_prior(C, sizes)
    assert torch.equal(channel_prior(d[:, None] * C * d, sizes / d.square()), prior * d.square())
    assert prior[2] == 0
    assert torch.equal(channel_prior(C, torch.zeros(5)), torch.zeros(5).double())


def test_damping_by_the_prior_follows_rescaled_channels():
    C, sizes = gram(6, 3), torch.rand(6, generator=torch.Generator().manual_seed(0)).double()
    d = 2.0 ** torch.tensor([9.0, 0, -20, 3, -5, 1]).double()
    L, damping = cholesky_damped(C, name="layer", sizes=sizes)
    other = cholesky_damped(d[:, None] * C * d, name="layer", sizes=sizes / d.square())
    assert damping > 0
    assert other[1] == damping
    assert torch.equal(other[0], d[:, None] * L)
