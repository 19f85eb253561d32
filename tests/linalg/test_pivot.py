import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import NumericalError
from spectrim.linalg.pivot import pack, packed_side, pivot_rows
from spectrim.tolerances import PIVOT_GROWTH_LIMIT, RANK_CUTOFF_FP64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(m, k, seed=0):
    return torch.linalg.qr(draw(m, k, seed=seed)).Q


def coefficients_of(U, order):
    k = U.shape[1]
    return U[order[k:]] @ torch.linalg.pinv(U[order[:k]])


@pytest.mark.parametrize(("m", "k"), [(30, 1), (30, 29), (30, 30), (64, 32), (300, 90)])
def test_order_is_a_permutation_and_growth_is_bounded(m, k):
    U = orthonormal(m, k)
    order = pivot_rows(U)
    assert sorted(order.tolist()) == list(range(m))
    assert order[:k].tolist() == sorted(order[:k].tolist())
    assert order[k:].tolist() == sorted(order[k:].tolist())
    if m > k:
        assert coefficients_of(U, order).abs().max() <= PIVOT_GROWTH_LIMIT * (1 + RANK_CUTOFF_FP64)


@pytest.mark.parametrize("m", [80, 400])
def test_swaps_multiply_the_volume(m):
    for seed in range(5):
        U = orthonormal(m, m // 3, seed)
        lu, _ = torch.linalg.lu_factor(U)
        picked = lu.diagonal().abs().log().sum()
        chosen = torch.linalg.slogdet(U[pivot_rows(U)[: m // 3]]).logabsdet
        assert chosen > picked + math.log(PIVOT_GROWTH_LIMIT)


@given(
    m=st.integers(1, 24), n=st.integers(1, 24), data=st.data(), side=st.sampled_from(["out", "in"])
)
@settings(max_examples=60, deadline=None)
def test_packing_is_exact_and_saves_the_square(m, n, data, side):
    k = data.draw(st.integers(1, min(m, n)))
    up, down = draw(m, k, seed=m), draw(k, n, seed=n + 100)
    packed = pack(up, down, side=side)
    exact = up @ down
    assert (packed.product() - exact).norm() <= 1e-10 * exact.norm()
    assert packed.numel == k * (m + n - k)
    assert (packed.shape, packed.rank) == ((m, n), k)
    assert packed.order.dtype == torch.int32


def test_pivot_rows_are_rows_of_the_matrix():
    up, down = draw(20, 6), draw(6, 31, seed=1)
    packed = pack(up, down)
    assert packed.side == "out"
    order = packed.order.long()
    assert torch.allclose(packed.basis, (up @ down)[order[:6]], atol=1e-12)
    assert torch.allclose(packed.coefficients @ packed.basis, (up @ down)[order[6:]], atol=1e-11)


def test_in_side_is_the_out_side_of_the_transpose():
    up, down = draw(31, 6), draw(6, 20, seed=1)
    inside, outside = pack(up, down), pack(down.T, up.T)
    assert (inside.side, outside.side) == ("in", "out")
    assert torch.equal(inside.basis, outside.basis.T)
    assert torch.equal(inside.coefficients, outside.coefficients.T)


def test_smaller_side_is_pivoted():
    assert [packed_side(3, 4), packed_side(4, 4), packed_side(5, 4)] == ["out", "out", "in"]


def test_dependent_first_rows_do_not_hurt():
    up, down = draw(60, 20), draw(20, 70, seed=1)
    up[:20] = up[:1]
    up[25] = 0.0
    packed = pack(up, down)
    assert packed.growth <= PIVOT_GROWTH_LIMIT
    assert (packed.product() - up @ down).norm() <= 1e-10 * (up @ down).norm()


@pytest.mark.parametrize("side", ["out", "in"])
def test_rank_deficient_and_badly_scaled_factors_stay_exact(side):
    up, down = draw(40, 12), draw(12, 44, seed=1)
    up = up * torch.logspace(0, -12, 12, dtype=torch.float64)
    up[:, 3] = up[:, 4]
    down[7] = down[8]
    packed = pack(up, down, side=side)
    assert packed.growth <= PIVOT_GROWTH_LIMIT
    assert (packed.product() - up @ down).norm() <= 1e-10 * (up @ down).norm()


def test_zero_matrix_packs_to_zero():
    packed = pack(torch.zeros(9, 3), torch.zeros(3, 8))
    assert packed.product().abs().max() == 0


def test_dependent_columns_are_refused():
    U = draw(30, 5)
    U[:, 4] = U[:, 0]
    with pytest.raises(NumericalError, match="5 independent pivot rows"):
        pivot_rows(U)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="are not"):
        pack(draw(4, 5), draw(5, 9))
    with pytest.raises(ValueError, match="are not"):
        pack(draw(9, 3), draw(4, 9))
    with pytest.raises(ValueError, match="cannot choose"):
        pivot_rows(draw(3, 4))
