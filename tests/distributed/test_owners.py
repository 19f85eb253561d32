"""Shares and owners: complete, disjoint, balanced within Graham's bound."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spectrim.distributed.owners import factorisation_cost, loads, owners, share
from spectrim.distributed.pool import assignment

COSTS = st.lists(st.integers(0, 1000), max_size=40)
RANKS = st.integers(1, 9)


@given(COSTS, RANKS)
def test_owners_are_balanced(costs, ranks):
    found = owners(costs, ranks)
    assert len(found) == len(costs) and set(found) <= set(range(ranks))
    sums = loads(costs, found, ranks)
    assert sum(sums) == sum(costs)
    # No rank is above the mean by more than the job that came last, and no schedule beats the
    # larger of the mean and the largest job; Graham: within 4/3 of the best.
    assert max(sums) <= sum(costs) / ranks + max(costs, default=0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(1, 3))
def test_owners_are_within_a_third_of_the_best(costs, ranks):
    best = min(
        max(loads(costs, way, ranks)) for way in itertools.product(range(ranks), repeat=len(costs))
    )
    assert max(loads(costs, owners(costs, ranks), ranks)) <= (4 / 3 - 1 / (3 * ranks)) * best + 1e-9


def test_a_block_of_a_llama_is_shared_well_by_two():
    d, f = 4096, 11008
    shapes = [(d, d)] * 4 + [(f, d), (f, d), (d, f)]
    costs = [factorisation_cost(*shape) for shape in shapes]
    assert costs[4] == f * d * d
    assert max(loads(costs, owners(costs, 2), 2)) < 1.06 * sum(costs) / 2


def test_nobody_cannot_share():
    with pytest.raises(ValueError, match="0 processes"):
        owners([1], 0)


@given(st.integers(0, 300), RANKS)
def test_shares_follow_one_another_and_differ_by_one_at_most(count, ranks):
    parts = [share(count, rank, ranks) for rank in range(ranks)]
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 6).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1)))))
def test_a_batch_is_spread_evenly_and_moves_as_little_as_it_can(case):
    ranks, holders = case
    workers = assignment(holders, ranks)
    assert len(workers) == len(holders)
    counts = [workers.count(rank) for rank in range(ranks)]
    assert max(counts) - min(counts) <= 1
    moved = sum(a != b for a, b in zip(holders, workers, strict=True))
    part, left = divmod(len(holders), ranks)
    held = sorted((holders.count(rank) for rank in range(ranks)), reverse=True)
    assert moved == sum(max(0, h - part - (i < left)) for i, h in enumerate(held))
