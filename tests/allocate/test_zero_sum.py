import heapq

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from spectrim.allocate import (
    Curve,
    Limits,
    Shape,
    break_even,
    layer_bytes,
    select,
    smallest_keep,
    zero_sum,
)
from spectrim.errors import InputError

SHAPES = [("q", 24, 24), ("k", 8, 24), ("up", 60, 24), ("down", 24, 60)]


def survey(seed=0, blocks=3, ties=False):
    generator = torch.Generator().manual_seed(seed)
    curves = []
    for b in range(blocks):
        for projection, m, n in SHAPES:
            energy = torch.exp(-4 * torch.arange(min(m, n), dtype=torch.float64) / min(m, n))
            score = torch.randn(min(m, n), generator=generator, dtype=torch.float64) * energy
            if ties:
                score = torch.round(score * 4) / 4
            shape = Shape(m, n, projection == "k")
            curves.append(
                Curve(
                    f"{b}.{projection}",
                    b,
                    projection,
                    shape,
                    energy,
                    float(energy.sum()),
                    score=score,
                )
            )
    return curves


def published(curves, keep, floor=0.0):
    """The two-heap selection written down plainly: returns ranks, running sums and drops."""
    cost = {}
    for c in curves:
        dense = layer_bytes(c.shape, rank=None, storage="dense")
        low = [layer_bytes(c.shape, rank=k, storage="factored") for k in range(1, c.rank + 1)]
        cost[c.name] = [None] + [min(dense, x) for x in low]
    dense = sum(x[-1] for x in cost.values())
    goal = dense - int(keep * dense + 1e-9)
    rank = {c.name: c.rank for c in curves}
    least = {c.name: max(1, int(np.ceil(floor * break_even(c.shape)))) for c in curves}
    score = {c.name: c.score.tolist() for c in curves}
    heaps = {True: [], False: []}

    def offer(name):
        if rank[name] > least[name]:
            value = score[name][rank[name] - 1]
            heapq.heappush(heaps[value >= 0], (abs(value), name, -rank[name]))

    for name in rank:
        offer(name)
    total, saved, sums = 0.0, 0, []
    while saved < goal:
        rising = total <= 0
        if not heaps[rising]:
            rising = not rising
        _, name, _ = heapq.heappop(heaps[rising])
        value = score[name][rank[name] - 1]
        rank[name] -= 1
        total += value
        saved += cost[name][rank[name] + 1] - cost[name][rank[name]]
        sums.append((total, abs(value), bool(heaps[True]) and bool(heaps[False])))
        offer(name)
    return rank, sums


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(20, 99), st.sampled_from([0.0, 0.3]), st.booleans())
def test_faithful_ranks_are_those_of_two_plain_heaps(seed, percent, floor, ties):
    curves, keep = survey(seed, ties=ties), percent / 100
    if floor and keep < 0.5:
        keep += 0.4
    rank, _ = published(curves, keep, floor)
    plan = zero_sum(curves, keep=keep, limits=Limits(floor=floor), faithful=True)
    for curve, entry in zip(curves, plan.entries, strict=True):
        expected = rank[curve.name]
        assert entry.rank == (expected if expected <= break_even(curve.shape) else None)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(20, 99))
def test_running_sum_stays_within_the_largest_drop(seed, percent):
    selection = select(survey(seed), keep=percent / 100, faithful=True)
    _, sums = published(survey(seed), percent / 100)
    largest = 0.0
    for mine, (total, size, both) in zip(selection.running_sum, sums, strict=True):
        assert mine == pytest.approx(total, abs=1e-12)
        largest = max(largest, size)
        if not both:
            break
        assert abs(mine) <= largest + 1e-12


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 99),
    st.integers(20, 100),
    st.sampled_from(["zero_sum", "magnitude", "negative", "sigma"]),
    st.sampled_from(["factored", "packed", "auto"]),
    st.sampled_from([1, 4]),
)
def test_budget_is_met_and_nothing_lies_above_break_even(seed, percent, key, storage, multiple):
    curves, keep = survey(seed), percent / 100
    limits = Limits(storage=storage, multiple=multiple)
    assume(keep >= smallest_keep(curves, limits))
    plan = zero_sum(curves, keep=keep, limits=limits, key=key)
    dense = sum(e.dense_bytes for e in plan.entries)
    left = keep * dense - sum(e.bytes for e in plan.entries)
    largest = max(2 * (c.shape.out_features + c.shape.in_features) for c in curves) * multiple
    assert -1e-6 <= left < largest
    for curve, entry in zip(curves, plan.entries, strict=True):
        if entry.rank is not None:
            assert entry.bytes < entry.dense_bytes
            if storage == "factored":
                assert entry.rank <= break_even(curve.shape)
    if percent == 100:
        assert all(e.rank is None for e in plan.entries)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.5, 0.7, 0.9]), st.randoms(use_true_random=False))
def test_order_of_targets_does_not_matter(seed, keep, random):
    curves = survey(seed, ties=True)
    shuffled = list(curves)
    random.shuffle(shuffled)
    expected = {e.name: e for e in zero_sum(curves, keep=keep).entries}
    assert {e.name: e for e in zero_sum(shuffled, keep=keep).entries} == expected


@pytest.mark.parametrize("key", ["zero_sum", "magnitude", "negative", "sigma"])
def test_spectral_order_drops_tails_only(key):
    curves = survey()
    for kept in select(curves, keep=0.6, key=key).kept:
        assert kept.tolist() == list(range(kept.size))


@pytest.mark.parametrize("key", ["magnitude", "negative", "sigma"])
def test_without_spectral_order_the_least_keys_go(key):
    curves = survey()
    selection = select(curves, keep=0.6, key=key, ordered=False)
    values = {
        "magnitude": [c.score.abs() for c in curves],
        "negative": [c.score for c in curves],
        "sigma": [c.energy for c in curves],
    }[key]
    drops = [
        float(values[t][p]) for t, p in zip(selection.targets, selection.positions, strict=True)
    ]
    if not selection.reverted:
        assert drops == sorted(drops)
    kept = selection.kept
    plan = zero_sum(curves, keep=0.6, key=key, ordered=False)
    for entry, curve, alive in zip(plan.entries, curves, kept, strict=True):
        assert alive.size == (entry.rank if entry.rank is not None else curve.rank)


def test_unordered_zero_sum_alternates_signs():
    selection = select(survey(), keep=0.7, ordered=False)
    curves = survey()
    changes = [
        float(curves[t].score[p])
        for t, p in zip(selection.targets, selection.positions, strict=True)
    ]
    before = np.append(0.0, selection.running_sum[:-1])
    late = len(changes) // 2
    assert all((c >= 0) == (s <= 0) for c, s in zip(changes[:late], before[:late], strict=True))


def dropped_sum(curves, kept):
    return sum(
        float(c.score.sum() - c.score[torch.from_numpy(k)].sum())
        for c, k in zip(curves, kept, strict=True)
    )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(30, 95))
def test_what_reverted_targets_leave_of_the_sum_is_redistributed(seed, percent):
    curves, keep = survey(seed), percent / 100
    published, ours = (select(curves, keep=keep, faithful=f) for f in (True, False))
    assert ours.targets.tolist() == published.targets.tolist()
    assert ours.reverted == published.reverted
    for i in ours.reverted:
        assert ours.kept[i].size == curves[i].rank
    before, after = dropped_sum(curves, published.kept), dropped_sum(curves, ours.kept)
    assert abs(after) <= abs(before) + 1e-12
    stored = sum(
        min(
            layer_bytes(c.shape, rank=k.size, storage="factored"),
            layer_bytes(c.shape, rank=None, storage="dense"),
        )
        for c, k in zip(curves, ours.kept, strict=True)
    )
    dense = sum(layer_bytes(c.shape, rank=None, storage="dense") for c in curves)
    assert stored <= keep * dense + 1e-9
    for curve, kept in zip(curves, ours.kept, strict=True):
        assert kept.size == curve.rank or kept.size <= break_even(curve.shape)


def test_reverts_happen_and_the_plan_says_so():
    assert "dense" in zero_sum(survey(3), keep=0.85).notes[0]


def test_scores_are_needed():
    with pytest.raises(InputError, match="score"):
        zero_sum([Curve("a", 0, "q", Shape(8, 8))], keep=0.5)
    with pytest.raises(InputError, match="unknown selection key"):
        select(survey(), keep=0.5, key="largest")
