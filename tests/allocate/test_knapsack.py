import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.allocate import Curve, Limits, Shape, knapsack, layer_bytes, uniform, zero_sum
from spectrim.allocate.choice import choose
from spectrim.allocate.forms import Form
from spectrim.errors import BudgetError, InputError

SHAPES = [(5, 7), (6, 6), (4, 9)]


def survey(seed, shapes=SHAPES, convex=True):
    generator = torch.Generator().manual_seed(seed)
    curves = []
    for i, (m, n) in enumerate(shapes):
        energy = torch.rand(min(m, n), generator=generator, dtype=torch.float64) + 0.01
        energy = energy.sort(descending=True).values * (1 + 3 * i)
        loss = None
        if not convex:
            drops = torch.rand(min(m, n), generator=generator, dtype=torch.float64) + 0.01
            loss = torch.cat([drops.flip(0).cumsum(0).flip(0), torch.zeros(1)])
        curves.append(
            Curve(f"t{i}", i, "q", Shape(m, n), energy, float(energy.sum()) * 1.1, loss=loss)
        )
    return curves


def brute_force(curves, keep, storages, weights, multiple):
    """Least loss over all combinations of ways."""
    shares = {"native": 0.0, "int8": 1e-4}
    ways, dense_total = [], 0
    for c in curves:
        dense = layer_bytes(c.shape, rank=None, storage="dense")
        dense_total += dense
        tail = [c.total - float(c.energy[:k].sum()) for k in range(c.rank + 1)]
        losses = tail if c.loss is None else c.loss.tolist()
        found = [(dense, 0.0)]
        for k in range(multiple, c.rank + 1, multiple):
            for s, w in itertools.product(storages, weights):
                size = layer_bytes(c.shape, rank=k, storage=s, weights=w)
                if size < dense:
                    found.append((size, losses[k] + shares[w] * losses[0]))
        ways.append(found)
    affordable = [
        sum(loss for _, loss in choice)
        for choice in itertools.product(*ways)
        if sum(size for size, _ in choice) <= keep * dense_total
    ]
    return min(affordable, default=None)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 999),
    st.integers(15, 100),
    st.sampled_from(["factored", "packed", "auto"]),
    st.sampled_from([("native",), ("native", "int8")]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_plan_is_the_best_of_all_plans(seed, percent, storage, weights, multiple, convex):
    curves, keep = survey(seed, convex=convex), percent / 100
    limits = Limits(storage=storage, multiple=multiple)
    kinds = ("factored", "packed") if storage == "auto" else (storage,)
    best = brute_force(curves, keep, kinds, weights, multiple)
    forms = [Form("dense"), *(Form(s, w) for s in kinds for w in weights)]
    arguments = {"keep": keep, "limits": limits, "score": "second_order", "forms": forms}
    if best is None:
        with pytest.raises(BudgetError, match="reachable are"):
            knapsack(curves, **arguments)
        return
    plan = knapsack(curves, **arguments)
    assert plan.predicted_loss == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert plan.notes == ()
    total = 0
    for curve, entry in zip(curves, plan.entries, strict=True):
        total += entry.bytes
        assert entry.bytes == layer_bytes(
            curve.shape, rank=entry.rank, storage=entry.storage, weights=entry.weights
        )
    assert total <= keep * sum(e.dense_bytes for e in plan.entries) + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_knapsack_itself_equals_brute_force(data):
    sizes, losses = [], []
    for _ in range(data.draw(st.integers(1, 4))):
        steps = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
        drops = data.draw(st.lists(st.integers(1, 9), min_size=len(steps), max_size=len(steps)))
        sizes.append(np.cumsum(steps))
        losses.append(np.cumsum(drops)[::-1].astype(float))
    least = sum(int(s[0]) for s in sizes)
    budget = least + data.draw(st.integers(0, 40))
    best = min(
        sum(x[p] for x, p in zip(losses, picks, strict=True))
        for picks in itertools.product(*(range(s.size) for s in sizes))
        if sum(s[p] for s, p in zip(sizes, picks, strict=True)) <= budget
    )
    choice = choose(sizes, losses, budget, states=100)
    assert sum(x[p] for x, p in zip(losses, choice.picks, strict=True)) == best
    assert choice.exact
    assert choice.bound <= best + 1e-9


def larger(seed):
    shapes = [(24, 24), (8, 24), (60, 24), (24, 60)] * 4
    return survey(seed, shapes)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.integers(20, 99), st.integers(1, 64))
def test_few_states_still_meet_the_budget_within_one_step(seed, percent, states):
    curves, keep = larger(seed), percent / 100
    plan = knapsack(curves, keep=keep, states=states)
    dense = sum(e.dense_bytes for e in plan.entries)
    left = keep * dense - sum(e.bytes for e in plan.entries)
    steps = [
        2 * (c.shape.out_features + c.shape.in_features)
        for c, e in zip(curves, plan.entries, strict=True)
        if e.rank is not None
    ]
    assert -1e-6 <= left < min(steps)


def test_predicted_loss_falls_with_keep_and_beats_other_rules():
    curves = larger(5)
    before = float("inf")
    for keep in [0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0]:
        loss = knapsack(curves, keep=keep).predicted_loss
        assert loss < before
        assert loss <= uniform(curves, keep=keep).predicted_loss + 1e-12
        before = loss
    assert before == 0


def test_packed_storage_loses_less_at_equal_bytes():
    shapes = [(128, 128), (256, 128)] * 3
    curves = survey(1, shapes)
    for keep in [0.4, 0.6, 0.8]:
        factored = knapsack(curves, keep=keep).predicted_loss
        both = knapsack(curves, keep=keep, limits=Limits(storage="auto")).predicted_loss
        assert both < factored


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(16)), st.sampled_from([0.3, 0.6, 0.8]))
def test_order_of_targets_does_not_matter(order, keep):
    curves = larger(2)
    expected = {e.name: e for e in knapsack(curves, keep=keep).entries}
    shuffled = knapsack([curves[i] for i in order], keep=keep)
    assert {e.name: e for e in shuffled.entries} == expected


def test_floors_bind():
    curves = larger(3)
    plan = knapsack(curves, keep=0.5, limits=Limits(floor=0.3, multiple=2))
    for curve, entry in zip(curves, plan.entries, strict=True):
        m, n = curve.shape.out_features, curve.shape.in_features
        assert entry.rank is None or (entry.rank >= 0.3 * (m * n // (m + n)) - 1)
        assert entry.rank is None or entry.rank % 2 == 0


def test_dense_targets_may_be_quantised_too():
    forms = [Form("dense"), Form("dense", "int8"), Form("factored")]
    plan = knapsack(survey(0), keep=0.75, forms=forms)
    assert any(e.storage == "dense" and e.weights == "int8" for e in plan.entries)
    with pytest.raises(InputError, match="forms is empty"):
        knapsack(survey(0), keep=0.75, forms=())


def test_measured_rounding_and_scales_decide_between_families():
    energy = np.linspace(2.0, 0.1, 24)
    dense, cut = Form("dense", "int4-g32"), Form("factored", "int8")
    rounding = {dense.key: np.array([0.5]), cut.key: np.linspace(0.0, 0.1, 25)}
    curve = Curve("t", 0, "q", Shape(24, 64), energy, float(energy.sum()), rounding=rounding)
    forms = (Form("dense"), dense, cut)
    options = {"keep": 0.5, "score": "second_order", "forms": forms}
    for scale in ({}, {"cutting": 10.0}, {"rounding": 40.0, "cutting": 1.0}):
        entry = knapsack([curve], scale=scale, **options).entries[0]
        weigh, noise = scale.get("cutting", 1.0), scale.get("rounding", 1.0)
        losses = {}
        for rank in range(1, 25):
            size = layer_bytes(curve.shape, rank=rank, storage="factored", weights="int8")
            if size <= 24 * 64:
                lost = weigh * energy[rank:].sum() + noise * rounding[cut.key][rank]
                losses["factored", rank] = lost
        losses["dense", None] = noise * 0.5
        best = min(losses, key=losses.get)
        assert (entry.storage, entry.rank) == best
        assert entry.loss == pytest.approx(losses[best])


def test_lossless_components_cost_no_bytes():
    energy = torch.tensor([1.0] * 10 + [0.0] * 30, dtype=torch.float64)
    low = Curve("low", 0, "q", Shape(40, 40), energy, 10.0)
    assert knapsack([low], keep=1.0)["low"].rank == 10


def test_other_rules_are_not_better_by_the_signed_scores():
    curves = larger(4)
    generator = torch.Generator().manual_seed(0)
    scored = [
        Curve(
            c.name,
            c.block,
            c.projection,
            c.shape,
            c.energy,
            c.total,
            score=torch.randn(c.rank, generator=generator, dtype=torch.float64),
        )
        for c in curves
    ]
    mine = knapsack(scored, keep=0.5, score="first_order")
    ranks = [e.rank for e in zero_sum(scored, keep=0.5).entries]
    from spectrim.allocate import loss_by_rank

    theirs = sum(
        0.0 if k is None else loss_by_rank(c, "first_order")[k]
        for c, k in zip(scored, ranks, strict=True)
    )
    assert mine.predicted_loss <= theirs + 1e-9


def test_residuals_are_chosen_by_losses_of_their_own_in_exact_bytes():
    energy = np.linspace(2.0, 0.1, 24)
    base, residual = Form("dense", "int3-g64"), Form("residual", "int3-g64+int8")
    # By rank; what cutting to a rank would lose has no part in it.
    losses = 0.4 * np.exp(-np.arange(25) / 6)
    rounding = {base.key: losses[:1], residual.key: losses}
    curve = Curve("t", 0, "q", Shape(24, 64), energy, float(energy.sum()), rounding=rounding)
    options = {"score": "second_order", "forms": (Form("dense"), base, residual)}
    sizes = {0: 24 * (24 + 2)} | {k: 24 * 26 + 24 * (k + 4) + k * 68 for k in (2, 4, 8, 16)}
    for limits, allowed in ((Limits(), (2, 4, 8, 16)), (Limits(multiple=8), (8, 16))):
        for budget in (24 * 26, *sizes.values()):
            keep = budget / (24 * 64 * 2) + 1e-9
            best = max(k for k in (0, *allowed) if sizes[k] <= budget)
            entry = knapsack([curve], keep=keep, limits=limits, **options).entries[0]
            assert (entry.rank or 0, entry.bytes) == (best, sizes[best])
            assert entry.loss == pytest.approx(losses[best])
            assert entry.components is None
            assert entry.corrected == (best > 0)
    noisy = knapsack([curve], keep=0.6, scale={"cutting": 9.0, "rounding": 2.0}, **options)
    assert noisy.predicted_loss == pytest.approx(2 * losses[noisy.entries[0].rank])
    assert noisy.cuts.entries[0].rank is None
