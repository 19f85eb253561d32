"""The shortened order of an artifact answers like the full order, and says what it cannot."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.allocate import Curve, Limits, Shape, break_even, layer_bytes
from spectrim.allocate.elastic import bytes_by_components, elastic_order, held_ranks
from spectrim.allocate.order import global_order, ranks_at
from spectrim.errors import BudgetError, InputError

SHAPES = [(24, 16), (16, 16), (8, 16), (40, 16), (16, 40)]
CURVES = [Curve(f"t{i}", 0, f"t{i}", Shape(m, n, i == 1)) for i, (m, n) in enumerate(SHAPES)]
DENSE = sum(layer_bytes(c.shape, rank=None, storage="dense", dtype_bytes=2) for c in CURVES)


def random_importance(seed, *, ties=False):
    rng = np.random.default_rng(seed)
    values = [rng.random(c.rank) for c in CURVES]
    return [(np.round(v, 1) if ties else v,) for v in values]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 100),
    keep=st.floats(0.35, 1.0),
    spectral=st.booleans(),
    ties=st.booleans(),
    limits=st.builds(Limits, floor=st.sampled_from([0.0, 0.2]), multiple=st.sampled_from([1, 2])),
)
def test_the_shortened_order_gives_the_plans_of_the_full_one(seed, keep, spectral, ties, limits):
    importance = random_importance(seed, ties=ties)
    full = global_order(CURVES, importance=importance, spectral=spectral)
    expected = ranks_at(full, CURVES, keep=keep, limits=limits)
    order, kept = elastic_order(CURVES, importance, limits=limits, spectral=spectral)
    plan = order.plan(keep)
    assert [(e.rank, e.bytes) for e in plan.entries] == [
        (e.rank, e.bytes) for e in expected.entries
    ]
    for i, index in enumerate(kept):
        assert index.tolist() == full.components(i)[: index.size].tolist()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 100), adapters=st.integers(0, 2))
def test_sizes_are_nested_monotone_and_within_one_component(seed, adapters):
    order, _ = elastic_order(CURVES, random_importance(seed), limits=Limits(), adapters=adapters)
    before = None
    for keep in np.linspace(order.smallest_keep, 1.0, 13):
        plan = order.plan(float(keep))
        ranks = [
            held + 1 if e.rank is None else e.rank
            for e, held in zip(plan.entries, order.held, strict=True)
        ]
        left = float(keep) * DENSE - sum(e.bytes for e in plan.entries)
        largest = max(2 * (m + n) for m, n in SHAPES)
        assert left >= -1e-6 * DENSE
        # The step from factored to dense is the only one that may be larger than a component.
        jump = max(
            c - 2 * h * (m + n)
            for (m, n), h, c in zip(SHAPES, order.held, (2 * m * n for m, n in SHAPES), strict=True)
        )
        assert left < max(largest, jump + 2 * 16)
        assert all(r >= adapters for r in ranks)
        if before is not None:
            assert all(a >= b for a, b in zip(ranks, before, strict=True))
        before = ranks
    assert all(e.rank is None for e in order.plan(1.0).entries)


def test_a_keep_below_the_end_names_the_smallest():
    alive = [v > 0.7 for (v,) in random_importance(3)]
    importance = [
        (np.where(a, np.inf, v),) for a, (v,) in zip(alive, random_importance(3), strict=True)
    ]
    least = [int(a.sum()) for a in alive]
    order, _ = elastic_order(CURVES, importance, limits=Limits(), adapters=1, least=least)
    for entry, rank in zip(order.plan(order.smallest_keep).entries, least, strict=True):
        assert entry.rank in (None, rank + 1)
    with pytest.raises(BudgetError, match=f"smallest reachable keep is {order.smallest_keep:.6f}"):
        order.plan(order.smallest_keep * 0.9)


def test_stored_components_never_cost_more_than_dense():
    order, kept = elastic_order(CURVES, random_importance(1), limits=Limits(), adapters=2)
    for curve, held, index in zip(CURVES, order.held, kept, strict=True):
        shape = curve.shape
        assert held == index.size + 2 <= break_even(shape)
        assert held * (shape.out_features + shape.in_features) <= (
            shape.out_features * shape.in_features
        )
    assert held_ranks(CURVES, Limits()) == [break_even(c.shape) for c in CURVES]


def test_too_many_adapters_are_refused():
    with pytest.raises(InputError, match="lower the adapter rank"):
        elastic_order(CURVES, random_importance(1), limits=Limits(), adapters=6)


def test_bytes_by_components_are_those_of_the_layers():
    for curve, table in zip(CURVES, bytes_by_components(CURVES, Limits(), adapters=1), strict=True):
        dense = layer_bytes(curve.shape, rank=None, storage="dense", dtype_bytes=2)
        for count, size in enumerate(table.tolist()):
            factored = (
                layer_bytes(curve.shape, rank=count + 1, storage="factored", dtype_bytes=2)
                if count < curve.rank
                else dense
            )
            assert size == min(dense, factored)
