import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.allocate import Curve, Shape, layer_bytes, rank_for, sensitivity
from spectrim.errors import BudgetError, InputError, NonFiniteError

CURVES = [Curve(x, 0, x, Shape(40 + 10 * i, 40)) for i, x in enumerate("abcd")]
CANDIDATES = (0.4, 0.6, 0.8)
tables = st.lists(st.floats(5, 50), min_size=12, max_size=12, unique=True).map(
    lambda v: dict(zip([(c.name, k) for c in CURVES for k in CANDIDATES], v, strict=True))
)


def sizes_for(allowed):
    """Bytes and keeps when these (name, keep) pairs are allowed, counted independently."""
    total, chosen = 0, {}
    for curve in CURVES:
        keep = min((k for name, k in allowed if name == curve.name), default=None)
        rank = None if keep is None else rank_for(curve.shape, keep)
        storage = "dense" if rank is None else "factored"
        total += layer_bytes(curve.shape, rank=rank, storage=storage)
        chosen[curve.name] = rank
    return total, chosen


@settings(max_examples=40, deadline=None)
@given(tables, st.sampled_from([0.45, 0.6, 0.75, 0.9, 1.0]))
def test_bisection_finds_what_trying_every_cut_finds(table, keep):
    dense, _ = sizes_for([])
    ranked = sorted(table, key=lambda e: -table[e])
    feasible = [
        chosen
        for size, chosen in (sizes_for(ranked[cut:]) for cut in range(len(ranked) + 1))
        if size <= keep * dense
    ]
    plan = sensitivity(CURVES, keep=keep, table=table, fill=False)
    assert {e.name: e.rank for e in plan.entries} == feasible[-1]
    assert "12 sensitivities" in plan.notes[0]


@settings(max_examples=20, deadline=None)
@given(tables, st.sampled_from([0.45, 0.6, 0.75, 0.9]))
def test_filling_stays_within_the_budget_and_one_step(table, keep):
    plan = sensitivity(CURVES, keep=keep, table=table)
    dense = sum(e.dense_bytes for e in plan.entries)
    left = keep * dense - sum(e.bytes for e in plan.entries)
    steps = [
        2 * (c.shape.out_features + 40)
        for c, e in zip(CURVES, plan.entries, strict=True)
        if e.rank is not None
    ]
    assert -1e-6 <= left < min(steps)


def test_the_most_sensitive_target_stays_dense():
    table = {(c.name, k): 10 - k for c in CURVES for k in CANDIDATES}
    table.update({("b", k): 1000 - k for k in CANDIDATES})
    plan = sensitivity(CURVES, keep=0.7, table=table, fill=False)
    assert plan["b"].rank is None


def test_impossible_budgets_and_tables_are_refused():
    table = {(c.name, 0.6): 7.0 for c in CURVES}
    with pytest.raises(BudgetError, match=r"reachable are 0\.\d+ to 1"):
        sensitivity(CURVES, keep=0.5, table=table)
    with pytest.raises(InputError, match="empty"):
        sensitivity(CURVES, keep=0.5, table={})
    with pytest.raises(InputError, match="'x'"):
        sensitivity(CURVES, keep=0.5, table={("x", 0.6): 7.0})
    with pytest.raises(NonFiniteError, match="NaN"):
        sensitivity(CURVES, keep=0.5, table={("a", 0.6): float("nan")})
