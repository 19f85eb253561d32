"""Sizes of rows and columns that do not depend on the units of the other."""

import pytest
import torch

from spectrim.linalg.scaling import row_and_column_sizes


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (30, 30), (1, 4)])
def test_scaled_by_their_sizes_rows_and_columns_are_alike(shape):
    W = drawn(*shape) * (10.0 ** drawn(shape[0], 1, seed=1)) * (10.0 ** drawn(shape[1], seed=2))
    rows, columns = row_and_column_sizes(W)
    scaled = W.square() / rows[:, None] / columns
    for sums in (scaled.sum(0), scaled.sum(1)):
        assert torch.allclose(sums, sums.mean().expand_as(sums), rtol=1e-8)


def test_other_units_change_their_own_sizes_and_nothing_else():
    W, f, d = drawn(6, 9), 10.0 ** drawn(6, seed=1), 10.0 ** drawn(9, seed=2)
    rows, columns = row_and_column_sizes(W)
    other_rows, other_columns = row_and_column_sizes(f[:, None] * W / d)
    for found, expected in ((other_rows, rows * f**2), (other_columns, columns / d**2)):
        factors = found / expected
        assert torch.allclose(factors, factors[:1].expand_as(factors), rtol=1e-8)


def test_what_is_alike_has_the_same_size():
    rows, columns = row_and_column_sizes(torch.ones(3, 4))
    assert torch.equal(rows, rows[:1].expand(3)) and torch.equal(columns, columns[:1].expand(4))


def test_rows_and_columns_of_zeros_have_none_and_leave_the_others_alone():
    W = drawn(6, 5)
    rows, columns = row_and_column_sizes(W)
    padded = torch.zeros(7, 7, dtype=torch.float64)
    padded[:6, 1:6] = W
    found_rows, found_columns = row_and_column_sizes(padded)
    assert found_rows[6] == 0 and found_columns[0] == found_columns[6] == 0
    ratio = found_columns[1:6] / columns
    assert torch.allclose(ratio, ratio[:1].expand(5), rtol=1e-8)
    ratio = found_rows[:6] / rows
    assert torch.allclose(ratio, ratio[:1].expand(6), rtol=1e-8)
    assert all(not sizes.any() for sizes in row_and_column_sizes(torch.zeros(2, 3)))


def test_a_pattern_of_zeros_without_rest_ends_all_the_same():
    rows, columns = row_and_column_sizes(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert torch.isfinite(rows).all() and torch.isfinite(columns).all()
