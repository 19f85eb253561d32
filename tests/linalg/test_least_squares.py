"""Damped least squares against the stacked problem solved by lstsq."""

import numpy as np
import pytest
import torch

from spectrim.errors import NonFiniteError
from spectrim.linalg.least_squares import RIDGES, evident_ridge, least_squares_map, solve_damped


def data(width=6, out=4, tokens=40):
    g = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    return make(width, tokens), make(out, tokens), make(out, width)


def test_solution_is_that_of_the_damped_system():
    X, Y, _ = data()
    C = X @ X.T
    ridge = 1e-3
    system = C + ridge * C.diagonal().mean() * torch.eye(6, dtype=C.dtype)
    solved = solve_damped(C, X @ Y.T, name="layer", ridge=ridge)
    assert torch.allclose(system @ solved, X @ Y.T)


@pytest.mark.parametrize(("tokens", "ridge"), [(40, 1e-3), (3, 1e-3), (40, 0.0)])
def test_map_minimises_fit_plus_distance_from_the_start(tokens, ridge):
    X, Y, start = data(tokens=tokens)
    C = X @ X.T
    found, damping = least_squares_map(Y @ X.T, C, start=start, name="layer", ridge=ridge)
    assert damping == ridge
    root = (ridge * C.diagonal().mean()).sqrt()
    stacked = torch.cat([X.T, root * torch.eye(6, dtype=C.dtype)])
    target = torch.cat([Y.T, root * start.T])
    assert torch.allclose(found.T, torch.linalg.lstsq(stacked, target).solution)


def test_singular_moments_give_the_nearest_map_to_the_start():
    X, Y, start = data(tokens=3)
    found, damping = least_squares_map(Y @ X.T, X @ X.T, start=start, name="layer", ridge=0.0)
    assert 0 < damping <= 1e-9
    nearest = start + (Y - start @ X) @ torch.linalg.pinv(X)
    assert torch.allclose(found, nearest, atol=1e-6)


def test_no_data_keeps_the_start():
    _, _, start = data()
    zero = torch.zeros(6, 6)
    found, damping = least_squares_map(torch.zeros(4, 6), zero, start=start, name="layer")
    assert torch.equal(found, start)
    assert damping == 0


def test_non_finite_sides_are_named():
    X, Y, start = data()
    cross = Y @ X.T
    cross[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"layer\.3.*cross"):
        least_squares_map(cross, X @ X.T, start=start, name="layer.3")


def test_sizes_weigh_the_distance_and_hold_columns_of_size_zero():
    X, Y, start = data()
    C, sizes = X @ X.T, torch.tensor([1.0, 0.0, 4.0, 0.25, 1.0, 9.0]).double()
    found, _ = least_squares_map(Y @ X.T, C, start=start, name="l", ridge=0.1, sizes=sizes)
    assert torch.equal(found[:, 1], start[:, 1])
    free = [0, 2, 3, 4, 5]
    root = (0.1 * (C.diagonal() * sizes).mean()).sqrt() / sizes[free].sqrt()
    left = Y - start @ X
    stacked = torch.cat([X[free].T, root.diag()])
    target = torch.cat([left.T, torch.zeros(5, 4, dtype=C.dtype)])
    moved = torch.linalg.lstsq(stacked, target).solution.T
    assert torch.allclose(found[:, free], start[:, free] + moved)


def unlikeliness(R, X, sizes, ridge):
    """The negative log-likelihood of R as draws of a Gaussian process over tokens, densely."""
    S = (X * sizes.sqrt()[:, None]).T @ (X * sizes.sqrt()[:, None])
    delta = ridge * float(S.trace()) / len(X)
    covariance = torch.eye(X.shape[1], dtype=X.dtype) + S / delta
    quadratic = float((R @ torch.linalg.inv(covariance) * R).sum())
    # As many tokens as channels are spent; they do not count in the noise's size.
    return float(torch.logdet(covariance)) + (X.shape[1] - len(X)) * float(np.log(quadratic))


@pytest.mark.parametrize("noise", [0.02, 0.5, 20.0])
def test_the_ridge_is_the_likeliest_one(noise):
    X, Y, change = data(tokens=60)
    sizes = torch.tensor([1.0, 2.0, 4.0, 0.25, 1.0, 9.0]).double()
    R = (change * sizes.sqrt()) @ X + noise * Y
    found = evident_ridge(R @ X.T, float(R.square().sum()), X @ X.T, 60, sizes=sizes, name="layer")
    values = {ridge: unlikeliness(R, X, sizes, ridge) for ridge in RIDGES}
    assert found == min(values, key=values.__getitem__)


def test_no_more_tokens_than_channels_choose_the_strongest_ridge():
    X, _, change = data(tokens=6)
    R, sizes = change @ X, torch.ones(6)
    found = evident_ridge(R @ X.T, float(R.square().sum()), X @ X.T, 6, sizes=sizes, name="layer")
    assert found == RIDGES[0]
