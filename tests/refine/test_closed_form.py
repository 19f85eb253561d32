"""The re-solved up factor is the least-squares answer from the data itself."""

import pytest
import torch

from spectrim.errors import NotPositiveDefiniteError
from spectrim.refine.closed_form import update_up


def data(out=9, width=12, tokens=80, k=4, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    X = normal(width, tokens)
    Y = X + 0.3 * normal(width, tokens)
    return normal(out, width), normal(k, width), X, Y


def error(W, X, up, down, Y):
    return float((W @ X - up @ down @ Y).square().sum())


@pytest.mark.parametrize("target", ["published", "original"])
def test_equals_dense_least_squares(target):
    W, A, X, Y = data()
    reached = Y if target == "published" else X
    cross = None if target == "published" else X @ Y.T
    B = update_up(W, A, Y @ Y.T, name="layer", ridge=1e-14, cross=cross)
    dense = torch.linalg.lstsq((A @ Y).T, (W @ reached).T).solution.T
    torch.testing.assert_close(B, dense, rtol=1e-9, atol=1e-9)


def test_never_worse_than_the_factor_before():
    W, A, _X, Y = data()
    before = W @ torch.linalg.pinv(A)
    B = update_up(W, A, Y @ Y.T, name="layer", ridge=1e-6)
    assert error(W, Y, B, A, Y) < error(W, Y, before, A, Y)


def test_unshifted_inputs_leave_the_optimum_alone():
    """On the inputs that it was decomposed for, the truncated factor is already the best one."""
    W, _, X, _ = data()
    U = torch.linalg.svd(W @ X).U[:, :4]
    B = update_up(W, U.T @ W, X @ X.T, name="layer", ridge=1e-14)
    torch.testing.assert_close(B, U, rtol=1e-9, atol=1e-9)


def test_ridge_is_relative():
    W, A, _X, Y = data()
    one = update_up(W, A, Y @ Y.T, name="layer", ridge=1e-2)
    other = update_up(W, A, 1e6 * (Y @ Y.T), name="layer", ridge=1e-2)
    torch.testing.assert_close(one, other)


def test_a_dependent_down_factor_is_damped():
    W, A, _X, Y = data()
    A[3] = A[2]
    B = update_up(W, A, Y @ Y.T, name="layer", ridge=1e-8)
    smaller = update_up(W, A[:3], Y @ Y.T, name="layer", ridge=1e-14)
    assert torch.isfinite(B).all()
    assert error(W, Y, B, A, Y) == pytest.approx(error(W, Y, smaller, A[:3], Y), rel=1e-6)


def test_inputs_of_half_precision_are_solved_in_double():
    W, A, _X, Y = data()
    B = update_up(W.bfloat16(), A.bfloat16(), Y @ Y.T, name="layer", ridge=1e-6)
    assert B.dtype == torch.float64


def test_an_indefinite_moment_names_the_layer():
    W, A, _X, Y = data()
    with pytest.raises(NotPositiveDefiniteError, match="the odd layer"):
        update_up(W, A, -Y @ Y.T, name="the odd layer", ridge=1e-6)
