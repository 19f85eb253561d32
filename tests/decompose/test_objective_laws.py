"""Laws that every objective obeys on every shape of data."""

import pytest
import torch


def product(decomposition, k):
    up, down = decomposition.cut(k)
    return up @ down


def test_predicted_error_equals_measured_error(case):
    d = case.decompose()
    assert d.rank == min(case.layer.W.shape)
    for k in range(1, d.rank + 1):
        measured = case.problem.value(product(d, k))
        assert d.error(k) == pytest.approx(measured, rel=case.slack, abs=case.floor)
    assert d.error(0) == pytest.approx(d.total, rel=1e-9)
    nothing = case.problem.value(torch.zeros_like(case.layer.W))
    assert d.total == pytest.approx(nothing, rel=1e-2 * case.slack)


def test_no_search_finds_a_better_answer(case):
    d = case.decompose()
    generator = torch.Generator().manual_seed(1)
    ours = case.problem.value(product(d, 3))
    for found in case.problem.alternating(3, generator):
        assert ours <= case.problem.value(found) * (1 + case.slack) + case.floor


def test_error_falls_with_rank(case):
    d = case.decompose()
    errors = d.errors()
    assert (d.energy >= 0).all()
    assert (d.energy[:-1] >= d.energy[1:]).all()
    assert (errors[:-1] >= errors[1:]).all()
    assert [d.error(k) for k in range(d.rank + 1)] == pytest.approx(errors.tolist(), rel=1e-12)


def test_full_rank_is_the_unconstrained_optimum(case):
    d = case.decompose()
    best = case.problem.target @ torch.linalg.pinv(case.problem.source)
    full = product(d, d.rank)
    assert case.problem.value(full) == pytest.approx(
        case.problem.value(best), rel=case.slack, abs=case.floor
    )
    if case.objective != "anchored" or case.options.get("blend") == 0:
        assert d.irreducible == pytest.approx(0.0, abs=case.floor)
        assert torch.allclose(full, case.layer.W, rtol=0, atol=1e-9)


def test_holding_fewer_components_changes_nothing_else(case):
    full, part = case.decompose(), case.decompose(rank=3)
    assert part.rank == 3
    assert torch.allclose(part.up, full.up[:, :3], rtol=1e-10, atol=1e-12)
    assert torch.allclose(part.down, full.down[:3], rtol=1e-10, atol=1e-12)
    assert part.total == full.total
    for k in range(4):
        assert part.error(k) == pytest.approx(full.error(k), rel=1e-12)


@pytest.mark.parametrize("shape", [(12, 9, 5), (8, 11, 60)])
def test_same_input_gives_same_finite_fp64_bytes(objective_case, shape, make):
    objective, options = objective_case
    first, second = (make(*shape).decompose(objective, **options) for _ in range(2))
    for one, other in (
        (first.up, second.up),
        (first.down, second.down),
        (first.energy, second.energy),
    ):
        assert torch.equal(one, other)
        assert one.dtype == torch.float64
        assert torch.isfinite(one).all()


def test_factors_scale_with_the_weight_only(objective_case, make):
    objective, options = objective_case
    layer = make(8, 10, 40)
    d = layer.decompose(objective, **options)
    scaled = type(layer)(3 * layer.W, layer.X, layer.X_shifted, layer.gradients)
    e = scaled.decompose(objective, **options)
    assert torch.allclose(product(e, 4), 3 * product(d, 4), atol=1e-10)
    assert torch.allclose(e.energy, 9 * d.energy, rtol=1e-10)


def test_tiny_tails_are_predicted(objective_case, make, problem_of):
    objective, options = objective_case
    layer = make(10, 12, 60)
    U, _, Vh = torch.linalg.svd(layer.W, full_matrices=False)
    W = U * 10.0 ** -torch.arange(0, 5, 0.5, dtype=torch.float64) @ Vh
    layer = type(layer)(W, layer.X, layer.X_shifted, layer.gradients)
    d = layer.decompose(objective, **options)
    problem = problem_of(objective, layer, options)
    for k in range(1, 9):
        assert d.error(k) == pytest.approx(problem.value(product(d, k)), rel=1e-6)
