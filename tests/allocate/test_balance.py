import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.allocate.balance import Balance


def instance(seed):
    generator = np.random.default_rng(seed)
    changes = [generator.normal(size=20) for _ in range(6)]
    sizes = [np.arange(21) * step for step in (3, 4, 5, 3, 4, 5)]
    ranks = generator.integers(5, 16, size=6).tolist()
    total = float(sum(c[k:].sum() for c, k in zip(changes, ranks, strict=True)))
    return changes, sizes, ranks, total


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 12))
def test_exchanges_shrink_the_sum_within_the_bytes(seed, left):
    changes, sizes, ranks, total = instance(seed)
    budget = left + sum(int(s[k]) for s, k in zip(sizes, ranks, strict=True))
    balance = Balance(
        changes=changes,
        sizes=sizes,
        ranks=ranks,
        lowest=[2] * 6,
        highest=[18] * 6,
        total=total,
        left=left,
    )
    balance.run()
    assert abs(balance.total) <= abs(total)
    assert all(2 <= k <= 18 for k in balance.ranks)
    recounted = float(sum(c[k:].sum() for c, k in zip(changes, balance.ranks, strict=True)))
    assert np.isclose(balance.total, recounted, atol=1e-9)
    spent = sum(int(s[k]) for s, k in zip(sizes, balance.ranks, strict=True))
    assert spent + balance.left == budget
    assert balance.left >= 0


def test_a_balanced_sum_is_left_alone():
    changes, sizes, ranks, _ = instance(0)
    balance = Balance(
        changes=changes,
        sizes=sizes,
        ranks=ranks,
        lowest=[0] * 6,
        highest=[20] * 6,
        total=0.0,
        left=9,
    )
    balance.run()
    assert (balance.ranks, balance.left) == (ranks, 9)


def test_the_largest_change_comes_back_first():
    changes = [np.array([5.0, 1.0]), np.array([5.0, 3.0])]
    balance = Balance(
        changes=changes,
        sizes=[np.arange(3)] * 2,
        ranks=[1, 1],
        lowest=[1, 1],
        highest=[2, 2],
        total=4.0,
        left=1,
    )
    balance.run()
    assert (balance.ranks, balance.total, balance.left) == ([1, 2], 1.0, 0)
