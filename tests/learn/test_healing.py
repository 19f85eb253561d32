"""Healing trains what it says, for every size that is used, and the order needs no training."""

import pytest
import torch

from architectures import windows
from gated_cases import gated_model, lessons_of
from spectrim.learn.acip import AcipPruning
from spectrim.learn.gates import DeathMap
from spectrim.learn.healing import HealingSettings, apply_plan, heal, order_by_fisher
from spectrim.learn.rate_line import RateLine
from spectrim.learn.surrogate import mean_square_gradients

HEALING = {
    "steps": 30,
    "parts": "factors",
    "sizes": "sampled",
    "objective": "kl",
    "learning_rate": 1e-3,
    "factor_learning_rate": 3e-3,
    "final_learning_rate": 0.1,
    "clip": 1.0,
    "grid": 4,
}


def prepared(rank=0):
    model, gated = gated_model("llama", rank=rank)
    lessons = lessons_of(model, teacher=model)
    return model, gated, lessons


def fisher(gated, lessons, stop_keep=0.4):
    squares = mean_square_gradients(gated, lessons, steps=2)
    pruned = AcipPruning(DeathMap.fresh(squares), 1.0, done=True)
    return squares, pruned, order_by_fisher(gated, squares, stop_keep=stop_keep)


def test_the_fisher_order_is_that_of_squares_per_cost():
    _, gated, lessons = prepared()
    held = [layer.down.clone() for layer in gated.layers.values()]
    squares, _, order = fisher(gated, lessons)
    for layer, down, part in zip(
        gated.layers.values(), held, gated.spans.split(squares), strict=True
    ):
        best = part.argsort(descending=True)[: layer.components]
        assert torch.equal(layer.down, down[best])
    # Across targets: what survives is worth more per number than what goes; the last one stays.
    plan = order.plan(0.6)
    kept, gone = [], []
    for entry, layer, part in zip(
        plan.entries, gated.layers.values(), gated.spans.split(squares), strict=True
    ):
        cost = layer.out_features + layer.in_features
        ranked = part.sort(descending=True).values / cost
        if entry.rank is not None:
            gone.append(ranked[entry.rank])
            if entry.rank > 1:
                kept.append(ranked[entry.rank - 1])
    assert min(kept) >= max(gone)


def test_the_fisher_order_ends_at_the_stop():
    _, gated, lessons = prepared()
    _, _, order = fisher(gated, lessons, stop_keep=0.5)
    assert 0.4 < order.smallest_keep <= 0.5


def test_spreading_components_over_both_factors_changes_nothing():
    model, gated, _ = prepared()
    ids = windows(2)
    with torch.no_grad():
        before = model(ids).logits
        for layer in gated.layers.values():
            up, down = layer.train_factors()
            assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)
        assert torch.allclose(model(ids).logits, before, atol=1e-4)
        for layer in gated.layers.values():
            layer.settle_factors()
        assert not [p for layer in gated.layers.values() for p in layer.parameters()]
        assert torch.allclose(model(ids).logits, before, atol=1e-4)


@pytest.mark.parametrize(("rank", "parts"), [(0, "factors"), (1, "factors"), (1, "corrections")])
def test_healing_brings_every_size_closer_to_the_original(rank, parts):
    _, gated, lessons = prepared(rank)
    _, pruned, order = fisher(gated, lessons)
    rows, keeps = torch.arange(8), (0.45, 0.6, 0.8)

    def divergences():
        found = []
        for keep in keeps:
            apply_plan(gated, order.plan(keep))
            found.append(lessons.measure(rows, "kl"))
        return found

    before = divergences()
    settings = HealingSettings(**{**HEALING, "parts": parts, "learning_rate": 1e-2})
    history = heal(gated, order, pruned, lessons, settings)
    assert [step for step, _, _ in history] == list(range(1, 31))
    assert all(a < b for a, b in zip(divergences(), before, strict=True))


def test_the_rate_line_is_a_mean_for_every_tenth():
    line = RateLine()
    for keep, loss in [(1.0, 4.0), (0.82, 5.0), (0.78, 6.0), (0.31, 9.0)]:
        line.see(keep, loss)
    assert line.text() == "1.0: 4, 0.8: 5.5, 0.3: 9"
    assert RateLine.over([[1, 4.0, 1.0]]).text() == "1.0: 4"
