"""Truncated decompositions against torch's full ones."""

import pytest
import torch

from spectrim.linalg.truncated import column_space


def normal(*shape):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64
    )


@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
def test_column_space_reproduces_the_matrix_from_its_smaller_side(shape):
    W = normal(*shape)
    space = column_space(W)
    assert space.core.shape == (4, shape[1])
    assert torch.allclose(space.lift(space.core), W)
