import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.allocate import Curve, Limits, Shape, break_even, layer_bytes, uniform
from spectrim.allocate.ladder import ladders_for, smallest_keep
from spectrim.errors import BudgetError, InputError

BLOCK = [
    ("q", 64, 64),
    ("k", 16, 64),
    ("v", 16, 64),
    ("o", 64, 64),
    ("up", 172, 64),
    ("d", 64, 172),
]


def llama(blocks=3, bias=False):
    return [
        Curve(f"layers.{b}.{p}", b, p, Shape(m, n, bias))
        for b in range(blocks)
        for p, m, n in BLOCK
    ]


limits = st.builds(
    Limits,
    storage=st.sampled_from(["factored", "packed", "auto"]),
    weights=st.sampled_from(["native", "int8"]),
    floor=st.sampled_from([0.0, 0.1, 0.3]),
    multiple=st.sampled_from([1, 4, 8]),
)


def check_plan(plan, curves, keep, limits):
    """The laws that every plan obeys, recounted from shapes."""
    total = dense = 0
    for entry, curve in zip(plan.entries, curves, strict=True):
        counted = layer_bytes(
            curve.shape, rank=entry.rank, storage=entry.storage, weights=entry.weights
        )
        full = layer_bytes(curve.shape, rank=None, storage="dense")
        assert (entry.name, entry.bytes, entry.dense_bytes) == (curve.name, counted, full)
        if entry.rank is not None:
            assert entry.rank % limits.multiple == 0
            assert entry.rank >= limits.floor * break_even(curve.shape)
            assert entry.bytes < full
        total, dense = total + counted, dense + full
    assert total <= keep * dense * (1 + 1e-12)
    return dense * keep - total


def smallest_step(plan, curves, limits):
    """Bytes of the cheapest single step up that the plan leaves open."""
    steps = [float("inf")]
    for entry, ladder in zip(plan.entries, ladders_for(curves, limits), strict=True):
        above = ladder.bytes[ladder.bytes > entry.bytes]
        steps.append(above[0] - entry.bytes if above.size else float("inf"))
    return min(steps)


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.4])
def test_floor_ranks_are_the_papers(keep):
    curves = llama()
    plan = uniform(curves, keep=keep, fill=False)
    for curve, entry in zip(curves, plan.entries, strict=True):
        m, n = curve.shape.out_features, curve.shape.in_features
        assert entry.rank == int(keep * m * n / (m + n) + 1e-9)
        assert entry.storage == "factored"


@settings(max_examples=25, deadline=None)
@given(limits, st.integers(30, 100), st.booleans())
def test_budget_is_met_within_one_step(limits, percent, bias):
    curves = llama(bias=bias)
    keep = percent / 100
    if keep < smallest_keep(curves, limits):
        with pytest.raises(BudgetError, match="reachable are"):
            uniform(curves, keep=keep, limits=limits)
        return
    left = check_plan(uniform(curves, keep=keep, limits=limits), curves, keep, limits)
    assert left < smallest_step(uniform(curves, keep=keep, limits=limits), curves, limits)
    check_plan(uniform(curves, keep=keep, limits=limits, fill=False), curves, keep, limits)


def test_ranks_grow_with_keep():
    curves = llama()
    before = [0] * len(curves)
    for keep in [0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95, 1.0]:
        now = [e.bytes for e in uniform(curves, keep=keep).entries]
        assert all(a < b for a, b in zip(before, now, strict=True))
        before = now
    assert before == [e.dense_bytes for e in uniform(curves, keep=1.0).entries]


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(18)), st.sampled_from([0.3, 0.61, 0.9]))
def test_order_of_targets_does_not_matter(order, keep):
    curves = llama()
    shuffled = uniform([curves[i] for i in order], keep=keep)
    plan = uniform(curves, keep=keep)
    assert {e.name: e for e in shuffled.entries} == {e.name: e for e in plan.entries}


def test_targets_of_equal_shape_differ_by_at_most_one_rank():
    plan = uniform(llama(), keep=0.617)
    for projection, _, _ in BLOCK:
        ranks = {e.rank for e in plan.entries if e.name.endswith(f".{projection}")}
        assert max(ranks) - min(ranks) <= 1


def test_floors_that_exceed_their_share_shrink_the_others():
    curves = [Curve("tiny", 0, "t", Shape(2, 300)), Curve("large", 0, "l", Shape(300, 300))]
    plan = uniform(curves, keep=0.2, fill=False)
    assert plan["tiny"].rank == 1
    assert plan["tiny"].kept > 0.2 > plan["large"].kept
    assert check_plan(plan, curves, 0.2, Limits()) >= 0


def test_an_unreachable_keep_names_the_range():
    with pytest.raises(BudgetError, match=r"reachable are 0\.\d+ to 1"):
        uniform(llama(), keep=0.2, limits=Limits(floor=0.3))


def test_predicted_loss_is_the_relative_error_where_spectra_are_known():
    energy = torch.tensor([4.0, 3.0, 2.0, 1.0])
    curve = Curve("a", 0, "a", Shape(4, 40), energy=energy, total=10.0)
    plan = uniform([curve], keep=0.6)
    assert plan["a"].rank == 2
    assert plan.predicted_loss == pytest.approx(0.3)
    assert uniform(llama(), keep=0.6).predicted_loss is None


def test_impossible_limits_and_names_are_refused():
    with pytest.raises(InputError, match="floor"):
        Limits(floor=1.0)
    with pytest.raises(InputError, match="multiple"):
        Limits(multiple=0)
    with pytest.raises(InputError, match="unique"):
        uniform([llama()[0]] * 2, keep=0.5)


def test_ranks_that_padding_makes_pointless_are_left_out():
    curves = [Curve("a", 0, "a", Shape(96, 64))]
    for storage in ("factored", "packed", "auto"):
        (ladder,) = ladders_for(curves, Limits(storage=storage, weights="int4"))
        assert (ladder.bytes[1:] > ladder.bytes[:-1]).all()
