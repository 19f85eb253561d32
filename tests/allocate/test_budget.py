import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.allocate.budget import (
    Shape,
    break_even,
    budget_bytes,
    bytes_by_rank,
    components,
    format_bytes,
    keep_for_size,
    layer_bytes,
    rank_for,
)
from spectrim.errors import BudgetError
from spectrim.sizes import parse_size

SQUARE, MLP = Shape(4096, 4096, False), Shape(11008, 4096, False)
shapes = st.builds(Shape, st.integers(1, 70), st.integers(1, 70), st.booleans())
storages = st.sampled_from(["factored", "packed"])
formats = st.sampled_from(["native", "int8", "int4"])


@pytest.mark.parametrize(
    "keep, square, mlp", [(0.8, 1638, 2388), (0.6, 1228, 1791), (0.4, 819, 1194)]
)
def test_ranks_of_the_papers_on_llama_7b(keep, square, mlp):
    assert rank_for(SQUARE, keep) == square
    assert rank_for(MLP, keep) == mlp
    assert rank_for(Shape(4096, 11008, False), keep) == mlp


@pytest.mark.parametrize(
    "m, n, rank", [(4096, 4096, 2047), (11008, 4096, 2985), (1024, 4096, 819), (14336, 4096, 3185)]
)
def test_break_even_ranks(m, n, rank):
    assert break_even(Shape(m, n, False)) == rank
    assert rank * (m + n) < m * n <= (rank + 1) * (m + n)


def counted(shape, rank, storage, weights, dtype_bytes):
    """Independent count: walk over every row of every stored matrix."""
    m, n = shape.out_features, shape.in_features
    if storage == "dense":
        matrices = [(m, n)]
    elif storage == "factored":
        matrices = [(m, rank), (rank, n)]
    else:
        matrices = [(rank, n), (m - rank, rank)] if m <= n else [(m, rank), (rank, n - rank)]
    total = 4 * min(m, n) if storage == "packed" else 0
    total += m * dtype_bytes if shape.bias else 0
    for rows, columns in matrices:
        for _ in range(rows):
            if weights == "native":
                total += columns * dtype_bytes
            elif weights == "int8":
                total += columns + 4
            else:
                total += sum(16 + 2 + 2 for _ in range(0, columns, 32))
    return total


@settings(deadline=None)
@given(shapes, storages, formats, st.sampled_from([2, 4]), st.data())
def test_layer_bytes_count_every_stored_number(shape, storage, weights, dtype_bytes, data):
    rank = data.draw(st.integers(1, components(shape)))
    options = {"storage": storage, "weights": weights, "dtype_bytes": dtype_bytes}
    expected = counted(shape, rank, **options)
    assert layer_bytes(shape, rank=rank, **options) == expected
    assert bytes_by_rank(shape, **options)[rank] == expected
    dense = layer_bytes(shape, rank=None, storage="dense", weights=weights, dtype_bytes=dtype_bytes)
    assert dense == counted(shape, None, "dense", weights, dtype_bytes)


@settings(deadline=None)
@given(shapes, storages, st.sampled_from(["native", "int8"]), st.sampled_from([2, 4]))
def test_bytes_never_fall_with_rank(shape, storage, weights, dtype_bytes):
    by_rank = bytes_by_rank(shape, storage=storage, weights=weights, dtype_bytes=dtype_bytes)
    assert by_rank.shape == (components(shape) + 1,)
    assert (np.diff(by_rank) >= 0).all()


@settings(deadline=None)
@given(shapes, storages, formats, st.integers(1, 100))
def test_rank_for_is_the_largest_that_fits(shape, storage, weights, percent):
    dense = counted(shape, None, "dense", "native", 2)
    rank = rank_for(shape, percent / 100, storage=storage, weights=weights)
    if percent == 100:
        assert rank is None
        return
    fitting = [
        k
        for k in range(1, components(shape) + 1)
        if 100 * counted(shape, k, storage, weights, 2) <= percent * dense
    ]
    assert rank == max(fitting, default=0)


@settings(deadline=None)
@given(shapes, storages, formats)
def test_break_even_is_the_last_rank_below_dense(shape, storage, weights):
    dense = counted(shape, None, "dense", "native", 2)
    below = [
        k for k in range(1, components(shape) + 1) if counted(shape, k, storage, weights, 2) < dense
    ]
    assert break_even(shape, storage, weights=weights) == max(below, default=0)


def test_packed_needs_fewer_numbers_and_counts_its_order():
    factored = layer_bytes(SQUARE, rank=1000, storage="factored")
    packed = layer_bytes(SQUARE, rank=1000, storage="packed")
    assert factored - packed == 2 * 1000**2 - 4 * 4096


def test_a_keep_is_read_as_the_decimal_it_prints_as():
    assert 0.29 * 100 < 29
    assert budget_bytes(0.29, 100) == 29
    assert budget_bytes(1, 100) == 100


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.01, float("nan")])
def test_a_keep_outside_its_range_is_refused(keep):
    with pytest.raises(BudgetError, match="keep"):
        rank_for(SQUARE, keep)


@pytest.mark.parametrize(
    "rank, storage", [(None, "factored"), (3, "dense"), (0, "factored"), (4097, "packed")]
)
def test_ranks_that_do_not_go_with_the_storage_are_refused(rank, storage):
    with pytest.raises(BudgetError, match="rank"):
        layer_bytes(SQUARE, rank=rank, storage=storage)


def test_dense_has_no_break_even():
    with pytest.raises(BudgetError, match="dense"):
        break_even(SQUARE, "dense")


@settings(deadline=None)
@given(st.integers(1, 10**12), st.integers(0, 10**12), st.floats(0.05, 1))
def test_a_size_becomes_a_keep_that_does_not_exceed_it(targets, other, share):
    goal = other + int(np.ceil(share * targets))
    keep = keep_for_size(goal, other_bytes=other, targets_dense_bytes=targets, smallest_keep=0.05)
    spent = other + budget_bytes(keep, targets)
    assert goal - 1 <= spent <= goal


@pytest.mark.parametrize("goal", [100, 299, 1001, 5000])
def test_an_impossible_size_names_the_possible_ones(goal):
    with pytest.raises(BudgetError, match=r"\(300 to 1000 bytes\)"):
        keep_for_size(goal, other_bytes=200, targets_dense_bytes=800, smallest_keep=0.125)


@pytest.mark.parametrize(
    "text, size",
    [
        ("3.5GB", 3_500_000_000),
        ("3.5 GiB", 3_758_096_384),
        ("800mb", 800_000_000),
        (" 12 KiB ", 12_288),
        ("2T", 2 * 10**12),
        (".5k", 500),
        ("1_000_000", 1_000_000),
        ("7B", 7),
        ("0.29GB", 290_000_000),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "3.5 XB", "1e9", "three", "0", "nan", "1,5GB"])
def test_nonsense_sizes_are_refused(text):
    with pytest.raises(BudgetError, match="size"):
        parse_size(text)


def test_bytes_are_written_for_people():
    assert [format_bytes(x) for x in (12, 1500, 3_500_000, 7 * 10**9)] == [
        "12 B",
        "1.50 kB",
        "3.50 MB",
        "7.00 GB",
    ]
