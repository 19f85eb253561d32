"""What layer classes store: exact losses against plain rounding, and no loss where none is due."""

import itertools
from dataclasses import replace

import pytest
import torch

from spectrim.layers.dense import QuantizedDense
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.quantized import quantize_layer, rounded
from spectrim.layers.residual import ResidualLinear
from spectrim.layers.source import Source

DTYPE = torch.float32


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def source(m=40, n=64, k=16):
    """A matrix with moments on both sides and its best factors in them."""
    W = draw(m, k, seed=1) @ draw(k, n, seed=2) + 0.1 * draw(m, n, seed=3)
    mixing = draw(n, n, seed=4) * torch.logspace(0, -1.5, n, dtype=torch.float64)
    C = mixing @ mixing.mT / n
    R = draw(m, 3 * m, seed=5) * torch.logspace(0, -1, m, dtype=torch.float64)[:, None]
    G = R @ R.mT / m
    left, right = torch.linalg.cholesky(G), torch.linalg.cholesky(C)
    U, s, Vh = torch.linalg.svd(left.mT @ W @ right)
    up = torch.linalg.solve_triangular(left.mT, U[:, :k], upper=True)
    down = torch.linalg.solve_triangular(right, s[:k, None] * Vh[:k], upper=False, left=False)
    return Source("t", W, None, (up, down), C, G)


def exact(one, approximation):
    E = approximation.double() - one.W
    return 0.5 * float(torch.trace(one.G @ E @ one.C @ E.mT))


@pytest.mark.parametrize("weights", ["int8", "int4-g32", "int3-g32", "int4-g32+int3-g64"])
def test_factors_rounded_in_their_metrics_lose_less_than_rounded_to_nearest(weights):
    one = source()
    up, down = one.factors
    stored = LowRankLinear.stored(one, 16, weights, dtype=torch.float32)
    found = exact(one, stored.dense_weight())
    assert one.loss(stored.dense_weight()) == pytest.approx(found, rel=1e-9)
    plain = LowRankLinear.from_factors(up, down, None, dtype=torch.float64, device="cpu")
    cut = exact(one, up @ down)
    nearest = exact(one, quantize_layer(plain, weights, dtype=torch.float32).dense_weight())
    assert cut <= found * (1 + 1e-9)
    assert found - cut < 0.6 * (nearest - cut)
    assert (stored.storage, stored.weights, stored.rank) == ("factored", weights, 16)


@pytest.mark.parametrize("weights", ["int8", "int4-g64", "int3-g32", "int2-g32"])
def test_a_dense_matrix_rounded_on_its_inputs_loses_less_there(weights):
    one = source()
    stored = QuantizedDense.stored(one, None, weights, dtype=torch.float32)
    nearest = rounded(one.W, weights, torch.float32)
    inputs = Source("t", one.W, C=one.C)
    assert inputs.loss(stored.dense_weight()) < 0.8 * inputs.loss(nearest)


def test_without_moments_everything_is_rounded_to_nearest():
    W = draw(24, 40)
    stored = QuantizedDense.stored(Source("t", W), None, "int4-g32", dtype=torch.float32)
    assert torch.equal(stored.dense_weight().double(), rounded(W, "int4-g32", torch.float32))


@pytest.mark.parametrize("base", ["int4-g64", "int3-g32", "int2-g64"])
def test_a_residual_loses_less_than_its_base_and_less_with_every_component(base):
    one = source()
    alone = exact(one, QuantizedDense.stored(one, None, base, dtype=torch.float32).dense_weight())
    losses = [alone]
    for rank in (2, 4, 8, 16):
        layer = ResidualLinear.stored(one, rank, f"{base}+int8", dtype=torch.float32)
        losses.append(exact(one, layer.dense_weight()))
        assert (layer.storage, layer.weights, layer.rank) == ("residual", f"{base}+int8", rank)
    assert all(b < 0.9 * a for a, b in itertools.pairwise(losses))


def test_turns_lose_less_than_the_residual_of_a_base_rounded_alone():
    one = source()
    base = QuantizedDense.stored(one, None, "int3-g32", dtype=torch.float32).dense_weight()
    rest = one.beside(base.double(), 8)
    alone = exact(one, base.double() + rest.factors[0] @ rest.factors[1])
    layer = ResidualLinear.stored(one, 8, "int3-g32+int8", dtype=torch.float32)
    assert exact(one, layer.dense_weight()) < 0.8 * alone


def test_the_leading_factors_are_the_best_in_both_moments_and_follow_rescaled_channels():
    one = source()
    up, down = one.leading(5)
    left, right = torch.linalg.cholesky(one.G), torch.linalg.cholesky(one.C)
    s = torch.linalg.svdvals(left.mT @ one.W @ right)
    assert one.loss(up @ down) == pytest.approx(0.5 * float(s[5:].square().sum()), rel=1e-9)
    torch.testing.assert_close(up.mT @ one.G @ up, torch.eye(5).double())
    inputs = torch.logspace(-1, 1, 64, dtype=torch.float64)
    outputs = torch.logspace(1, -1, 40, dtype=torch.float64)
    moved = Source(
        "t",
        outputs[:, None] * one.W / inputs,
        C=inputs[:, None] * one.C * inputs,
        G=one.G / outputs / outputs[:, None],
    )
    again = torch.mm(*moved.leading(5))
    torch.testing.assert_close(again, outputs[:, None] * (up @ down) / inputs)


@pytest.mark.parametrize("moments", [False, True])
def test_a_matrix_that_its_base_holds_has_an_empty_correction(moments):
    one = source()
    C, G = (one.C, one.G) if moments else (None, None)
    held = rounded(one.W, "int4-g32", torch.float32)
    for W in (torch.zeros_like(held), held):
        layer = ResidualLinear.stored(Source("t", W, C=C, G=G), 2, "int4-g32+int8", dtype=DTYPE)
        torch.testing.assert_close(layer.dense_weight().double(), W, rtol=0, atol=1e-6)


def test_a_residual_multiplies_as_the_matrix_it_stands_for_and_keeps_its_bias():
    one = replace(source(), bias=draw(40, seed=9))
    layer = ResidualLinear.stored(one, 4, "int3-g32+int8", dtype=DTYPE)
    x = draw(3, 5, 64, seed=10).float()
    expected = torch.nn.functional.linear(x, layer.dense_weight(), one.bias.float())
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(layer.bias, one.bias.float())
