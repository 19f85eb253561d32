"""What layer classes store: exact losses against plain rounding, and no loss where none is due."""

import pytest
import torch

from spectrim.layers.dense import QuantizedDense
from spectrim.layers.lowrank import LowRankLinear
from spectrim.layers.quantized import quantize_layer, rounded
from spectrim.layers.source import Source


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
