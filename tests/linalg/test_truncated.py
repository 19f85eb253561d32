"""Truncated decompositions against torch's full ones."""

import pytest
import torch

from spectrim.errors import NonFiniteError
from spectrim.linalg.truncated import column_space, leading_eigenvectors, truncated_svd


def normal(*shape):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    )


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (5, 5)])
def test_truncated_svd_is_the_head_of_the_full_one(shape):
    W = normal(*shape)
    U, s, Vh = truncated_svd(W, 3, name="layer")
    full_U, full_s, full_Vh = torch.linalg.svd(W, full_matrices=False)
    assert torch.allclose(s, full_s[:3])
    assert torch.allclose((U * s) @ Vh, (full_U[:, :3] * full_s[:3]) @ full_Vh[:3])
    assert torch.allclose(U.T @ U, torch.eye(3, dtype=U.dtype))
    assert torch.allclose(Vh @ Vh.T, torch.eye(3, dtype=U.dtype))


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_column_space_reproduces_the_matrix_from_its_smaller_side(shape):
    W = normal(*shape)
    space = column_space(W)
    assert space.core.shape == (4, shape[1])
    assert torch.allclose(space.lift(space.core), W)


def test_leading_eigenvectors_belong_to_the_largest_values():
    S = normal(6, 6)
    S = S + S.T
    values, vectors = leading_eigenvectors(S, 2, name="layer")
    assert torch.allclose(values, torch.linalg.eigvalsh(S).flip(0)[:2])
    assert torch.allclose(S @ vectors, vectors * values)
    assert torch.equal(vectors, leading_eigenvectors(S, name="layer")[1][:, :2])


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="layer"):
        leading_eigenvectors(torch.eye(3), 4, name="layer")
    with pytest.raises(ValueError, match="rank 4"):
        truncated_svd(torch.ones(3, 5), 4, name="layer")
    with pytest.raises(NonFiniteError, match="layer"):
        truncated_svd(torch.full((2, 2), float("inf")), 1, name="layer")
