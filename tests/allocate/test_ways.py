"""Targets in one form: hulls of sums against all combinations, plans that keep groups alike."""

from itertools import product

import numpy as np
import pytest

from spectrim.allocate.budget import Shape
from spectrim.allocate.curve import Curve
from spectrim.allocate.forms import AUTO
from spectrim.allocate.knapsack import knapsack
from spectrim.allocate.ladder import Limits
from spectrim.allocate.ways import Ways, joined, together, undominated


def random_ways(seed, count):
    numbers = np.random.default_rng(seed)
    sizes = np.sort(numbers.choice(1000, count, replace=False))
    losses = np.sort(numbers.random(count))[::-1]
    return undominated([Ways.of_one(0, np.arange(count), sizes, losses)])


@pytest.mark.parametrize("seed", range(5))
def test_together_is_as_good_as_any_combination_at_every_price(seed):
    members = [random_ways(10 * seed + i, 4 + i) for i in range(3)]
    found = together(members)
    every = [
        (
            sum(w.bytes[p] for w, p in zip(members, places, strict=True)),
            sum(w.loss[p] for w, p in zip(members, places, strict=True)),
        )
        for places in product(*(range(w.bytes.size) for w in members))
    ]
    sizes, losses = map(np.array, zip(*every, strict=True))
    assert np.all(np.diff(found.bytes) > 0) and np.all(np.diff(found.loss) < 0)
    for price in np.logspace(-6, 0, 30):
        least = (losses + price * sizes).min()
        assert np.isclose((found.loss + price * found.bytes).min(), least, rtol=1e-12)


def curves(blocks=3):
    found = []
    for block in range(blocks):
        for i, (projection, group) in enumerate(
            [("q", 0), ("k", 0), ("o", 1), ("gate", 2), ("up", 2)]
        ):
            numbers = np.random.default_rng(10 * block + i)
            energy = np.sort(numbers.exponential(size=64) * (1 + i))[::-1]
            found.append(
                Curve(
                    f"b{block}.{projection}",
                    block,
                    projection,
                    Shape(64, 96, False),
                    energy.copy(),
                    energy.sum(),
                    group=group,
                )
            )
    return found


@pytest.mark.parametrize("keep", [0.12, 0.2, 0.4, 0.7])
def test_groups_have_one_form_and_free_plans_lose_no_more(keep):
    options = {"keep": keep, "score": "kfac"}
    alike = knapsack(curves(), limits=Limits(weights=AUTO, alike=True), **options)
    free = knapsack(curves(), limits=Limits(weights=AUTO), **options)
    forms = {}
    for entry, curve in zip(alike.entries, curves(), strict=True):
        forms.setdefault((curve.block, curve.group), set()).add((entry.storage, entry.weights))
    assert all(len(found) == 1 for found in forms.values())
    assert alike.achieved_keep <= keep
    assert free.predicted_loss <= alike.predicted_loss * (1 + 1e-3)


def test_without_groups_nothing_is_joined():
    bare = [Curve(f"t{i}", 0, "t", Shape(8, 8, False)) for i in range(3)]
    assert joined(bare, alike=True) == joined(curves(1)[:3], alike=False) == [[0], [1], [2]]
    assert joined(curves(1), alike=True) == [[0, 1], [2], [3, 4]]
