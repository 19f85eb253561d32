"""The correction against its definition: least squares with one constraint per gradient."""

import pytest
import torch

from spectrim.errors import NonFiniteError
from spectrim.refine.projected_gradient import corrected, minimum_norm_step, span_step


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_one_gradient_keeps_the_first_order_effect_with_the_least_norm():
    difference, gradient = draw(7, 5, seed=1), draw(7, 5, seed=2)
    step = minimum_norm_step(difference, gradient, name="t")
    torch.testing.assert_close((step * gradient).sum(), (difference * gradient).sum())
    # Any other step with the same effect is the minimum plus something orthogonal to g.
    for seed in range(5):
        other = draw(7, 5, seed=10 + seed)
        other -= gradient * ((other * gradient).sum() / gradient.square().sum())
        assert (step + 0.1 * other).norm() > step.norm()


def test_several_gradients_give_the_projection_on_their_span():
    difference = draw(6, 4)
    gradients = [draw(6, 4, seed=s) for s in (1, 2, 3)]
    step = span_step(difference, gradients, name="t", ridge=1e-12)
    basis = torch.stack([g.flatten() for g in gradients], 1)
    expected = torch.linalg.lstsq(basis, difference.flatten()[:, None]).solution
    torch.testing.assert_close(step.flatten(), (basis @ expected).flatten(), rtol=1e-8, atol=1e-9)


def test_one_gradient_in_a_span_is_the_minimum_norm_step():
    difference, gradient = draw(6, 4), draw(6, 4, seed=1)
    one = minimum_norm_step(difference, gradient, name="t")
    torch.testing.assert_close(span_step(difference, [gradient], name="t", ridge=1e-12), one)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_step_does_not_depend_on_the_gradients_scale(scale):
    difference, gradients = draw(6, 4), [draw(6, 4, seed=s) for s in (1, 2)]
    plain = span_step(difference, gradients, name="t")
    scaled = span_step(difference, [g * scale for g in gradients], name="t")
    torch.testing.assert_close(scaled, plain)
    torch.testing.assert_close(
        minimum_norm_step(difference, gradients[0] * scale, name="t"),
        minimum_norm_step(difference, gradients[0], name="t"),
    )


def test_dependent_gradients_are_no_special_case():
    difference, gradient = draw(6, 4), draw(6, 4, seed=1)
    step = span_step(difference, [gradient, gradient, -2 * gradient], name="t")
    torch.testing.assert_close(
        step, minimum_norm_step(difference, gradient, name="t"), rtol=1e-5, atol=1e-6
    )


def test_without_gradient_nothing_moves():
    W, cut = draw(5, 3), draw(5, 3, seed=1)
    nothing = torch.zeros(5, 3)
    torch.testing.assert_close(corrected(W, cut, [nothing], name="t"), cut)
    torch.testing.assert_close(corrected(W, cut, [nothing, nothing], name="t"), cut)


def test_small_steps_survive_in_half_precision_models():
    W = torch.ones(8, 8, dtype=torch.bfloat16)
    cut = torch.ones(8, 8) * (1 - 1e-4)
    moved = corrected(W, cut, [torch.ones(8, 8, dtype=torch.bfloat16)], name="t")
    assert moved.dtype == torch.float32
    torch.testing.assert_close(moved, torch.ones(8, 8), rtol=1e-6, atol=0)


def test_a_gradient_along_the_difference_restores_the_weight():
    W, cut = draw(5, 3), draw(5, 3, seed=1)
    along = 3 * (W - cut) / W.square().sum(0)  # in units of the columns
    torch.testing.assert_close(corrected(W, cut, [along], name="t"), W)


@pytest.mark.parametrize("count", [1, 3])
def test_rescaled_channels_get_the_same_correction(count):
    W, cut = draw(5, 4), draw(5, 4, seed=1)
    gradients = [draw(5, 4, seed=2 + i) for i in range(count)]
    d = torch.tensor([2.0**12, 1.0, 0.25, 2.0**-9]).double()
    ours = corrected(W, cut, gradients, name="t")
    theirs = corrected(W / d, cut / d, [g * d for g in gradients], name="t")
    torch.testing.assert_close(theirs * d, ours, rtol=1e-12, atol=1e-12)


def test_what_is_not_finite_is_refused_by_name():
    W = draw(3, 3)
    bad = torch.full((3, 3), float("nan"))
    with pytest.raises(NonFiniteError, match=r"block\.q"):
        corrected(W, W, [bad], name="block.q")
