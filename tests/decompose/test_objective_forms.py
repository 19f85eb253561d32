"""Each objective against an independent closed form or brute-force dense algebra."""

import pytest
import torch

from spectrim.decompose import decompose
from spectrim.moments.moments import Moments, OutputMoments


def product(decomposition, k):
    up, down = decomposition.cut(k)
    return up @ down


def truncated(M, k):
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    return (U[:, :k] * s[:k]) @ Vh[:k], s


@pytest.mark.parametrize("shape", [(7, 12), (13, 8), (9, 9)])
def test_cholesky_eigenvalue_and_output_covariance_forms_agree(make, shape):
    layer = make(*shape, 60)
    W, C = layer.W, layer.moments.C
    d = layer.decompose("whitened")
    L = torch.linalg.cholesky(C)
    values, vectors = torch.linalg.eigh(C)
    half = vectors * values.sqrt()
    for k in (1, 4, min(shape)):
        M, s = truncated(W @ L, k)
        by_cholesky = torch.linalg.solve_triangular(L, M, upper=False, left=False)
        by_eigenvalues = truncated(W @ half, k)[0] @ torch.linalg.pinv(half)
        _, vectors = torch.linalg.eigh(W @ C @ W.T)
        leading = vectors[:, -k:]
        by_outputs = leading @ leading.T @ W
        for other in (by_cholesky, by_eigenvalues, by_outputs):
            assert torch.allclose(product(d, k), other, atol=1e-9)
        assert torch.allclose(d.energy, s.square(), rtol=1e-9)


def test_up_factor_is_orthonormal_and_down_is_its_projection(make):
    layer = make(13, 8, 60)
    for objective in ("plain", "activation", "whitened", "shifted"):
        d = layer.decompose(objective)
        assert torch.allclose(d.up.T @ d.up, torch.eye(8, dtype=d.up.dtype), atol=1e-12)
        assert torch.allclose(d.down, d.up.T @ layer.W, atol=1e-12)


def test_plain_energies_are_squared_singular_values(make):
    layer = make(7, 12, 20)
    approximation, s = truncated(layer.W, 3)
    d = layer.decompose("plain")
    assert torch.allclose(d.energy, s.square())
    assert torch.allclose(product(d, 3), approximation)


def test_fisher_is_the_published_scale_svd_unscale(make):
    layer = make(7, 12, 20)
    root_in = layer.output.fisher_in.sqrt()
    root_out = layer.output.fisher_out.sqrt()[:, None]
    by_columns = truncated(layer.W * root_in, 3)[0] / root_in
    by_rows = truncated(layer.W * root_out, 3)[0] / root_out
    assert torch.allclose(product(layer.decompose("fisher"), 3), by_columns)
    assert torch.allclose(product(layer.decompose("fisher", side="out"), 3), by_rows)


def test_activation_is_the_published_scale_svd_unscale(make):
    layer = make(7, 12, 20)
    scale = layer.X.abs().mean(1).sqrt()
    expected = truncated(layer.W * scale, 3)[0] / scale
    assert torch.allclose(product(layer.decompose("activation"), 3), expected)
    unscaled = product(layer.decompose("activation", alpha=0.0), 3)
    assert torch.allclose(unscaled, product(layer.decompose("plain"), 3))


@pytest.mark.parametrize("tokens", [60, 5])
def test_of_all_optimal_answers_the_nearest_to_the_weight_is_given(make, tokens):
    layer = make(8, 11, tokens, dead=(3,))
    W, X = layer.W, layer.X
    answer = product(layer.decompose("whitened"), 2)
    unseen = torch.eye(11, dtype=W.dtype) - X @ torch.linalg.pinv(X)
    up = torch.linalg.qr(answer)[0][:, :2]
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        change = torch.randn(2, 11, generator=generator, dtype=W.dtype) @ unseen
        other = answer + 0.1 * up @ change
        assert torch.allclose((W - other) @ X, (W - answer) @ X, atol=1e-9)
        assert (W - other).norm() > (W - answer).norm()


def test_beyond_the_seen_rank_components_follow_the_spectrum_of_even_channels(make):
    layer = make(9, 12, 4)
    d = layer.decompose("whitened")
    even = layer.W / layer.W.norm(dim=0)
    rest = (layer.W - product(d, 4)) / layer.W.norm(dim=0)
    assert float(d.energy[4:].sum()) <= 1e-12 * d.total
    for k in range(5, 9):
        expected = torch.linalg.svdvals(rest)[k - 4 :].norm()
        left = even - product(d, k) / layer.W.norm(dim=0)
        assert float(left.norm()) == pytest.approx(float(expected), rel=1e-9)


def test_without_calibration_tokens_every_channel_is_worth_the_same(make):
    layer = make(6, 8, 10)
    empty = Moments(0, *(torch.zeros(8, 8, dtype=torch.float64) for _ in range(3)), torch.zeros(8))
    silent = OutputMoments(0, 0, torch.zeros(6, 6))
    norms = layer.W.norm(dim=0)
    even = decompose("plain", layer.W / norms, name="layer")
    for objective in ("activation", "whitened", "shifted", "anchored", "kfac"):
        d = decompose(objective, layer.W, empty, silent, name="layer")
        assert d.total == 0
        assert torch.allclose(product(d, 3), product(even, 3) * norms, atol=1e-9)


def test_anchored_with_equal_streams_is_whitened(make):
    layer = make(7, 12, 60)
    C = layer.moments.C
    same = Moments(60, C, C, C)
    anchored = decompose("anchored", layer.W, same, name="layer")
    whitened = layer.decompose("whitened")
    assert torch.allclose(anchored.energy, whitened.energy, rtol=1e-10)
    assert anchored.irreducible <= 1e-12 * anchored.total
    for k in range(1, 8):
        assert torch.allclose(product(anchored, k), product(whitened, k), atol=1e-9)


def test_anchored_without_blend_is_shifted(make):
    layer = make(13, 8, 60)
    anchored, shifted = layer.decompose("anchored", blend=0.0), layer.decompose("shifted")
    assert torch.allclose(anchored.energy, shifted.energy, rtol=1e-9)
    assert torch.allclose(product(anchored, 3), product(shifted, 3), atol=1e-9)


@pytest.mark.parametrize("shape", [(7, 12), (13, 8)])
def test_anchored_is_the_papers_cholesky_form(make, shape):
    layer = make(*shape, 60)
    W, moments = layer.W, layer.moments
    d = layer.decompose("anchored", ridge=0.0)
    L = torch.linalg.cholesky(moments.shifted)
    M = torch.linalg.solve_triangular(L, (W @ moments.cross).T, upper=False).T
    for k in (1, 4, min(shape)):
        cut, s = truncated(M, k)
        expected = torch.linalg.solve_triangular(L, cut, upper=False, left=False)
        assert torch.allclose(product(d, k), expected, atol=1e-8)
    total = float(((W @ moments.C) * W).sum())
    assert d.irreducible == pytest.approx(total - float(M.square().sum()), rel=1e-9)
    assert torch.allclose(d.energy, s.square(), rtol=1e-8)


@pytest.mark.parametrize("tokens", [5, 60])
def test_anchored_is_the_nearest_map_for_the_ridge_that_it_reports(make, tokens):
    layer = make(8, 11, tokens)
    d = layer.decompose("anchored")
    W, X, Y = layer.W, layer.X, layer.X_shifted
    norms = W.norm(dim=0)
    delta = d.ridge * float((Y.square().sum(1) * norms.square()).mean())
    stacked = torch.cat([Y.T, delta**0.5 * (1 / norms).diag()])
    target = torch.cat([(W @ (X - Y)).T, torch.zeros(11, 8, dtype=W.dtype)])
    expected = W + torch.linalg.lstsq(stacked, target).solution.T
    assert torch.allclose(product(d, 8), expected, atol=1e-9)
    assert d.ridge == 1 or tokens == 60


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_kfac_error_is_the_kronecker_quadratic_form(make, shape):
    layer = make(*shape, 40)
    d = layer.decompose("kfac", shrink_out=0.0)
    G, C = layer.output.G / 40, layer.moments.C / 40
    curvature = torch.kron(G, C)  # row-major vec(Δ): rows are outputs
    for k in range(1, min(shape) + 1):
        delta = (layer.W - product(d, k)).reshape(-1)
        assert d.error(k) == pytest.approx(
            float(0.5 * delta @ curvature @ delta), rel=1e-6, abs=1e-12 * d.total
        )


def test_kfac_beats_descent_and_the_transposed_left_factor(make):
    layer = make(6, 8, 40)
    d = layer.decompose("kfac", shrink_out=0.0)
    G, C = layer.output.G / 40, layer.moments.C / 40
    L, R = torch.linalg.cholesky(G), torch.linalg.cholesky(C)

    def value(W):
        delta = layer.W - W
        return float(0.5 * torch.trace(delta.T @ G @ delta @ C))

    transposed = torch.linalg.solve(L, truncated(L @ layer.W @ R, 2)[0]) @ torch.linalg.inv(R)
    assert value(product(d, 2)) < 0.99 * value(transposed)
    up, down = (t.clone().requires_grad_() for t in d.cut(2))
    delta = layer.W - up @ down
    torch.trace(delta.T @ G @ delta @ C).backward()
    for factor in (up, down):
        assert float(factor.grad.norm() * factor.detach().norm()) < 1e-8 * d.total


def test_kfac_with_identity_outputs_is_whitened(make):
    layer = make(13, 8, 60)
    identity = OutputMoments(60, 1, 60 * torch.eye(13, dtype=torch.float64))
    d = decompose("kfac", layer.W, layer.moments, identity, name="layer", shrink_out=0.0)
    whitened = layer.decompose("whitened")
    assert torch.allclose(d.energy, whitened.energy / 60 / 2, rtol=1e-9)
    assert torch.allclose(product(d, 3), product(whitened, 3), atol=1e-9)


def test_kfac_energy_is_the_loss_increase_per_token_of_a_softmax_layer():
    """For logits y = Wx with labels drawn from the model, Fisher is the loss's Hessian."""
    g = torch.Generator().manual_seed(0)
    tokens, width, classes = 60000, 4, 3
    W = 0.05 * torch.randn(classes, width, generator=g, dtype=torch.float64)
    X = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    p = (X @ W.T).softmax(1)
    labels = torch.multinomial(p, 1, generator=g)[:, 0]
    gradients = p - torch.nn.functional.one_hot(labels, classes)
    output = OutputMoments(tokens, 1, gradients.T @ gradients)
    d = decompose(
        "kfac", W, Moments(tokens, X.T @ X), output, name="layer", rank=1, shrink_out=1e-6
    )
    cut = (X @ product(d, 1).T).log_softmax(1)
    increase = float((p * (p.log() - cut)).sum(1).mean())
    assert d.error(1) == pytest.approx(increase, rel=0.05)


@pytest.mark.parametrize("objective", ["whitened", "shifted", "anchored"])
def test_shrinkage_blends_toward_channels_of_equal_worth(make, objective):
    layer = make(7, 12, 60)
    C = layer.moments.shifted if objective != "whitened" else layer.moments.C
    sizes = layer.W.square().sum(0)
    mixed = 0.8 * C + 0.2 * ((C.diagonal() * sizes).mean() / sizes).diag()
    options = {"ridge": 1e9} if objective == "anchored" else {}  # the map is then W itself
    expected = decompose("whitened", layer.W, Moments(60, mixed), name="layer")
    d = layer.decompose(objective, shrink_in=0.2, **options)
    assert torch.allclose(d.energy, expected.energy, rtol=1e-6)


@pytest.mark.parametrize("shape", [(7, 12), (13, 8)])
@pytest.mark.parametrize(
    ("objective", "options"),
    [("plain", {}), ("activation", {}), ("whitened", {}), ("kfac", {"shrink_in": 0.1})],
)
@pytest.mark.parametrize("tokens", [60, 5])
def test_a_spectrum_has_the_energies_without_the_vectors(make, shape, objective, options, tokens):
    layer = make(*shape, tokens)
    whole = layer.decompose(objective, **options)
    spectrum = layer.decompose(objective, rank=0, **options)
    assert spectrum.rank == 0
    scale = float(whole.energy[0])
    assert torch.allclose(spectrum.energy, whole.energy, rtol=1e-9, atol=1e-12 * scale)
    assert spectrum.total == pytest.approx(whole.total)
    assert torch.allclose(spectrum.errors()[:-1], whole.errors()[:-1], atol=1e-12 * scale)
