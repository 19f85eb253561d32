"""Damped least squares against the stacked problem solved by lstsq."""

import pytest
import torch

from spectrim.errors import NonFiniteError
from spectrim.linalg.least_squares import least_squares_map, solve_damped


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
