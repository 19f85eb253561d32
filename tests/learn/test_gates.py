import math

import pytest
import torch

from architectures import tiny, windows
from gated_cases import gated_model, lessons_of
from spectrim.learn.gates import ALIVE, DeathMap, Spans, gate_values, start_value
from spectrim.learn.surrogate import mean_square_gradients

FUNCTIONS = ["straight_through", "relu", "sigmoid", "softplus"]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_gate_starts_at_one(function):
    start = torch.full((5,), start_value(function, 0.02))
    assert torch.allclose(gate_values(start, function, scale=0.02), torch.ones(5), atol=1e-7)


def test_straight_through_gates_are_exactly_zero_or_one():
    scores = torch.tensor([0.02, 1e-30, 0.0, -0.3, 7.0], requires_grad=True)
    gates = gate_values(scores, "straight_through", scale=0.02)
    assert gates.tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]
    gates.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert torch.allclose(scores.grad, torch.tensor([1.0, 2.0, 0.0, 0.0, 5.0]) / 0.02)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_open_gates_and_untrained_corrections_are_the_original(name):
    original, _ = tiny(name)
    model, gated = gated_model(name, rank=2, deviation=True)
    gated.bind_scores(
        gated.scores("straight_through", scale=0.02, dtype=torch.float32),
        "straight_through",
        scale=0.02,
    )
    ids = windows(3)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, original(ids).logits, atol=2e-4, rtol=1e-4)


def test_the_gate_gradient_is_the_sensitivity_of_its_component():
    """dL/dmu_i = u_iᵀ G a_i / c with G the gradient of the dense weight."""
    scale = 0.02
    original, _ = tiny("llama")
    original.double()
    model, gated = gated_model(dtype=torch.float64)
    lessons, dense = lessons_of(model), lessons_of(original)
    scores = gated.scores("straight_through", scale=scale, dtype=torch.float64)
    bind = lambda _: gated.bind_scores(scores, "straight_through", scale=scale)  # noqa: E731
    lessons.backward(0, "cross_entropy", bind)
    dense.backward(0, "cross_entropy", lambda _: None)
    for (name, layer), part in zip(
        gated.layers.items(), gated.spans.split(scores.grad), strict=True
    ):
        G = original.get_submodule(name).weight.grad
        expected = torch.einsum("mk,mn,kn->k", layer.up, G, layer.down) / scale
        assert torch.allclose(part, expected, rtol=1e-8, atol=1e-12), name


def test_the_surrogate_is_the_mean_square_of_the_gate_gradient():
    model, gated = gated_model(dtype=torch.float64)
    lessons = lessons_of(model)
    squares = []
    for step in range(3):
        scores = gated.scores("straight_through", scale=1.0, dtype=torch.float64)
        gated.bind_scores(scores, "straight_through", scale=1.0)
        lessons.backward(step, "cross_entropy", lambda _: None)
        squares.append(scores.grad.square())
    expected = torch.stack(squares).mean(0).float()
    assert torch.allclose(mean_square_gradients(gated, lessons, steps=3), expected, rtol=1e-4)


def test_deaths_are_final_and_dead_scores_stay_zero():
    scores = torch.tensor([0.1, 0.2, 0.3])
    deaths = DeathMap.fresh(scores)
    scores -= 0.1
    deaths.record(scores, 1)
    scores += torch.tensor([0.5, 0.0, 0.0])  # what momentum might do to a dead gate
    deaths.record(scores, 2)
    scores -= 0.15
    deaths.record(scores, 3)
    assert deaths.died.tolist() == [1, 3, ALIVE]
    assert scores[:2].tolist() == [0.0, 0.0]
    assert deaths.value[0] == 0.0
    assert deaths.value[1] == pytest.approx(-0.05)


def test_keys_put_early_deaths_first_and_break_ties():
    scores = torch.tensor([0.5, 0.1, 0.1, 0.4])
    deaths = DeathMap.fresh(scores)
    deaths.watch(torch.tensor([1.0, 1.0, 2.0, 1.0]))
    scores -= torch.tensor([0.1, 0.2, 0.2, 0.4])
    deaths.record(scores, 5)
    keys = [torch.cat(c) for c in zip(*deaths.keys(Spans((2, 2))), strict=True)]
    rows = list(zip(*(k.tolist() for k in keys), strict=True))
    ranked = sorted(range(4), key=lambda i: rows[i])
    assert ranked == [1, 2, 3, 0]
    assert rows[0][0] == math.inf


def test_dead_components_left_out_of_the_products_change_nothing():
    model, gated = gated_model(dtype=torch.float64, rank=1)
    for lora in (x.lora for x in gated.layers.values()):
        torch.nn.init.normal_(lora.up, generator=torch.Generator().manual_seed(0))
    drawn = torch.rand(gated.spans.total, generator=torch.Generator().manual_seed(1))
    mask = drawn > 0.4
    ids = windows(2)
    gated.bind(mask.double())
    with torch.no_grad():
        expected = model(ids).logits
        gated.use(mask | (drawn > 0.3))
        assert torch.allclose(model(ids).logits, expected, atol=1e-10)
        gated.use(None)
        assert torch.equal(model(ids).logits, expected)


def test_kept_bytes_are_counted_from_shapes():
    _, gated = gated_model(rank=2)
    mask = torch.rand(gated.spans.total, generator=torch.Generator().manual_seed(2)) > 0.5
    total = 0
    for layer, part in zip(gated.layers.values(), gated.spans.split(mask), strict=True):
        m, n = layer.out_features, layer.in_features
        rank = int(part.sum()) + 2
        total += 4 * min(rank * (m + n), m * n)
    assert gated.kept_bytes(mask) == total
    assert gated.kept(torch.ones_like(mask)) == 1.0
