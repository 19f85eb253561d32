"""The output-weighted anchored objective against dense algebra and alternating least squares."""

import pytest
import torch

from priors import alike, mixed
from spectrim.decompose import decompose
from spectrim.moments.moments import Moments, OutputMoments

OUT, IN, TOKENS = 9, 7, 60


def data(seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=g, dtype=torch.float64)
    x = torch.randn(TOKENS, IN, generator=g, dtype=torch.float64) @ mix
    shifted = x + 0.3 * torch.randn(TOKENS, IN, generator=g, dtype=torch.float64)
    W = torch.randn(OUT, IN, generator=g, dtype=torch.float64)
    gradients = torch.randn(TOKENS, OUT, generator=g, dtype=torch.float64) * torch.linspace(
        0.1, 3, OUT, dtype=torch.float64
    )
    moments = Moments(TOKENS, x.mT @ x, shifted.mT @ shifted, x.mT @ shifted)
    return W, x, shifted, moments, OutputMoments(TOKENS, 1, G=gradients.mT @ gradients)


def value(W, approximation, x, shifted, G):
    """½ Σ_t eᵀ (G/T) e over T, from the tokens themselves."""
    error = x @ W.mT - shifted @ approximation.mT
    return 0.5 * float((error @ G / TOKENS * error).sum()) / TOKENS


def run(W, moments, output, **options):
    return decompose("anchored_kfac", W, moments, output, name="t", **options)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_predicted_error_is_the_measured_one_at_every_rank(share):
    W, x, shifted, moments, output = data()
    found = run(W, moments, output, shrink_out=share, ridge=0.0)
    G = mixed(output.G, share, alike(W)[0])
    for k in range(1, IN + 1):
        up, down = found.cut(k)
        assert found.error(k) == pytest.approx(value(W, up @ down, x, shifted, G), rel=1e-5)


def test_alternating_least_squares_does_not_beat_it():
    W, x, shifted, moments, output = data(1)
    G, k = mixed(output.G, 0.1, alike(W)[0]), 3
    up, down = run(W, moments, output, shrink_out=0.1, ridge=0.0).cut(k)
    best = value(W, up @ down, x, shifted, G)
    y = x @ W.mT
    root = torch.linalg.cholesky(G)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        A = torch.randn(k, IN, generator=generator, dtype=torch.float64)
        for _ in range(300):
            z = shifted @ A.mT
            B = torch.linalg.lstsq(z, y).solution.mT  # for fixed A the weight G cancels
            # For fixed B: min over A of ‖Lᵀ (y − B A x')‖, a least-squares problem in L-space.
            C = torch.linalg.lstsq(root.mT @ B, root.mT @ y.mT).solution
            A = torch.linalg.lstsq(shifted, C.mT).solution.mT
        assert best <= value(W, B @ A, x, shifted, G) * (1 + 1e-6)


def test_without_output_weight_it_is_anchored():
    W, _, _, moments, _ = data(2)
    output = OutputMoments(TOKENS, 1, G=torch.eye(OUT, dtype=torch.float64))
    ours = run(W, moments, output, shrink_out=0.0, ridge=0.0)
    theirs = decompose("anchored", W, moments, name="t", ridge=0.0)
    for k in (1, 4, IN):
        torch.testing.assert_close(
            torch.mm(*ours.cut(k)), torch.mm(*theirs.cut(k)), rtol=1e-7, atol=1e-9
        )


def test_without_shift_it_is_kfac():
    W, x, _, _, output = data(3)
    C = x.mT @ x
    ours = run(W, Moments(TOKENS, C, C, C), output, shrink_out=0.2)
    theirs = decompose("kfac", W, Moments(TOKENS, C), output, name="t", shrink_out=0.2)
    for k in (1, 4, IN):
        torch.testing.assert_close(
            torch.mm(*ours.cut(k)), torch.mm(*theirs.cut(k)), rtol=1e-6, atol=1e-8
        )
        assert ours.error(k) == pytest.approx(theirs.error(k), rel=1e-6, abs=1e-12)


def test_a_target_without_gradient_costs_nothing():
    W, _, _, moments, _ = data(4)
    output = OutputMoments(TOKENS, 1, G=torch.zeros(OUT, OUT, dtype=torch.float64))
    found = run(W, moments, output)
    assert found.total == 0.0 and found.rank == IN


def test_a_deficit_of_shifted_inputs_alone_is_the_anchored_answer():
    W, x, shifted, moments, output = data(7)
    missing = (x - shifted) @ W.mT
    sums = {"deficit": missing.mT @ shifted, "deficit_square": missing.mT @ missing}
    ours = run(W, Moments(TOKENS, None, moments.shifted, **sums), output, shrink_out=0.2)
    theirs = run(W, moments, output, shrink_out=0.2)
    assert ours.ridge == theirs.ridge
    for k in (1, 4, IN):
        torch.testing.assert_close(torch.mm(*ours.cut(k)), torch.mm(*theirs.cut(k)))
        assert ours.error(k) == pytest.approx(theirs.error(k), rel=1e-6)


def test_what_the_stream_lacks_is_made_up_for():
    W, x, shifted, moments, output = data(8)
    lost = shifted @ torch.randn(IN, OUT, dtype=torch.float64) / 10
    missing = (x - shifted) @ W.mT + lost
    sums = {"deficit": missing.mT @ shifted, "deficit_square": missing.mT @ missing}
    G = mixed(output.G, 0.2, alike(W)[0])

    def left(found, k):
        error = missing + shifted @ (W - torch.mm(*found.cut(k))).mT
        return 0.5 * float((error @ G / TOKENS * error).sum()) / TOKENS

    options = {"shrink_out": 0.2, "ridge": 0.0}
    ours = run(W, Moments(TOKENS, None, moments.shifted, **sums), output, **options)
    theirs = run(W, moments, output, **options)
    for k in (2, 5, IN):
        assert ours.error(k) == pytest.approx(left(ours, k), rel=1e-5)
        assert left(ours, k) < left(theirs, k)
