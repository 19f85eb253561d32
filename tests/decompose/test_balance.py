"""Balancing keeps the product and splits its singular values evenly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.decompose.balance import balanced


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_balancing_keeps_the_product_and_shares_its_spectrum(out, width, data):
    k = data.draw(st.integers(1, min(out, width)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    up = torch.randn(out, k, generator=g, dtype=torch.float64) * 100
    down = torch.randn(k, width, generator=g, dtype=torch.float64) / 100
    B, A = balanced(up, down)
    assert B.shape == up.shape
    assert A.shape == down.shape
    assert torch.allclose(B @ A, up @ down, atol=1e-10)
    s = torch.linalg.svdvals(up @ down)[:k]
    assert torch.allclose(B.T @ B, s.diag(), atol=1e-9)
    assert torch.allclose(A @ A.T, s.diag(), atol=1e-9)


def test_a_pair_of_lower_rank_keeps_its_shape():
    up = torch.ones(4, 3)
    B, A = balanced(up, torch.ones(3, 5))
    assert torch.isfinite(B).all()
    assert torch.allclose(B @ A, 3 * torch.ones(4, 5, dtype=torch.float64))


def test_impossible_pairs_are_refused():
    with pytest.raises(ValueError, match="cannot balance"):
        balanced(torch.ones(4, 3), torch.ones(2, 5))
    with pytest.raises(ValueError, match="at most"):
        balanced(torch.ones(2, 3), torch.ones(3, 5))
