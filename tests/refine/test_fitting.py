"""The training loop keeps the best state and leaves the untouched one after a failure."""

import itertools
import math

import pytest
import torch
from torch import nn

from spectrim.errors import InputError, NonFiniteError
from spectrim.refine.course import Course, hold_out
from spectrim.refine.fitting import FitSettings, fit
from spectrim.refine.pace import warmup_cosine

SETTINGS = {
    "steps": 40,
    "judge_every": 4,
    "batch": 4,
    "micro_batch": 4,
    "learning_rate": 0.05,
    "final_learning_rate": 0.1,
    "weight_decay": 0.0,
    "warmup": 0.1,
    "clip": 1.0,
}


class Regression:
    """A linear map to be found from windows of random vectors."""

    def __init__(self, dtype=torch.float32):
        g = torch.Generator().manual_seed(0)
        self.x = torch.randn(16, 3, 5, generator=g)
        self.y = self.x @ torch.randn(5, 2, generator=g)
        self.weight = nn.Parameter(torch.zeros(5, 2, dtype=dtype))
        self.train, self.held = hold_out(16, 0.25)

    def loss_of(self, rows):
        found = self.x[rows] @ self.weight.float()
        return (found - self.y[rows]).square().mean()

    def judge(self):
        with torch.no_grad():
            return float(self.loss_of(self.held))

    def loss_or_judgement(self, rows):
        """Nothing but a judgement is asked for without gradients, and it is of all held out."""
        return self.loss_of(rows) if torch.is_grad_enabled() else torch.tensor(self.judge())

    def fit(self, judged=True, **changes):
        course = Course(self.train, self.held if judged else self.held[:0], tokens=3)
        settings = FitSettings(**{**SETTINGS, **changes})
        return fit("the map", [self.weight], self.loss_or_judgement, course, settings)


def test_schedule():
    rates = [warmup_cosine(i, 100, warmup=0.1, final=0.1) for i in range(101)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert max(rates) == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[100] == pytest.approx(0.1)
    assert warmup_cosine(0, 1, warmup=0.0, final=0.0) == 1.0


@pytest.mark.parametrize(("windows", "share", "held"), [(8, 0.125, 1), (9, 0.5, 4), (2, 0.01, 1)])
def test_held_out_windows_are_spread_and_disjoint(windows, share, held):
    train, kept = hold_out(windows, share)
    assert len(kept) == held
    assert sorted([*train.tolist(), *kept.tolist()]) == list(range(windows))


def test_nothing_is_held_out_unless_asked():
    train, held = hold_out(3, 0.0)
    assert train.tolist() == [0, 1, 2] and not len(held)


@pytest.mark.parametrize("windows", [1, 2])
def test_too_few_windows_are_refused(windows):
    with pytest.raises(InputError, match=rf"{windows} calibration window"):
        hold_out(windows, 0.9)


def test_training_finds_the_map_and_reports_what_it_judged():
    problem = Regression()
    before = problem.judge()
    result = problem.fit()
    assert result.before == before
    assert result.after == problem.judge() == min(loss for _, loss in result.history)
    assert result.after < 0.2 * before
    assert [step for step, _ in result.history] == list(range(0, 41, 4))
    assert result.selected and result.tokens_per_second > 0


def test_the_best_judged_state_is_kept_and_not_the_last():
    problem = Regression()
    losses = iter([5.0, 4.0, 1.0, 2.0, 3.0])
    seen = []

    def judge():
        seen.append(problem.weight.detach().clone())
        return next(losses)

    problem.judge = judge
    result = problem.fit(steps=16)
    assert (result.step, result.before, result.after) == (8, 5.0, 1.0)
    assert torch.equal(problem.weight, seen[2])


def test_the_untouched_state_is_kept_where_training_only_hurts():
    problem = Regression()
    problem.weight.data.copy_(
        torch.linalg.lstsq(problem.x.flatten(0, 1), problem.y.flatten(0, 1)).solution
    )
    start = problem.weight.detach().clone()
    result = problem.fit(learning_rate=3.0)
    assert result.step == 0 and result.after == result.before
    assert torch.equal(problem.weight, start)


def test_without_judgement_the_last_state_is_kept():
    problem = Regression()
    result = problem.fit(judged=False)
    assert not result.selected and result.step == 40 and not result.history
    assert 0 < result.after < result.before and math.isfinite(result.before)


def test_small_passes_add_up_to_the_batch():
    one, other = Regression(), Regression()
    one.fit()
    other.fit(micro_batch=3)
    torch.testing.assert_close(one.weight, other.weight)


@pytest.mark.parametrize("moment", ["loss", "gradient", "judgement", "inside"])
def test_divergence_restores_and_names(moment):
    problem, calls = Regression(), []
    plain_loss, plain_judge = problem.loss_of, problem.judge
    start = problem.weight.detach().clone()

    def loss_of(rows):
        calls.append(1)
        loss = plain_loss(rows)
        if len(calls) < 12 or not torch.is_grad_enabled():
            return loss
        if moment == "inside":
            raise NonFiniteError("a block overflowed")
        if moment == "gradient":
            return loss + (problem.weight * 0).sum().sqrt()
        return loss * (math.nan if moment == "loss" else 1)

    problem.loss_of = loss_of
    if moment == "judgement":
        problem.judge = lambda: plain_judge() if len(calls) < 12 else math.inf
    message = r"refinement of the map diverged at step \d+ of 40.*learning_rate"
    with pytest.raises(NonFiniteError, match=message):
        problem.fit()
    assert torch.equal(problem.weight, start)


def test_a_broken_start_is_not_blamed_on_the_rate():
    problem = Regression()
    problem.judge = lambda: math.nan
    with pytest.raises(NonFiniteError, match="broken before its training"):
        problem.fit()


class Scaled(Regression):
    """The same map, held in other units: `weight / unit` is what multiplies."""

    def __init__(self, unit):
        super().__init__()
        start = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
        self.unit, self.weight = unit, nn.Parameter(unit * start)

    def loss_of(self, rows):
        return (self.x[rows] @ (self.weight / self.unit) - self.y[rows]).square().mean()


def test_relative_steps_do_not_depend_on_the_units_of_a_tensor():
    large, small = Scaled(64.0), Scaled(1 / 64)
    for problem in (large, small):
        # Gradients scale too, and Adam does not mind as long as nothing is clipped.
        problem.fit(relative=True, clip=1e6)
    torch.testing.assert_close(large.weight / 64, small.weight * 64, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(large.weight / 64, Scaled(1.0).weight, rtol=0.05)


def test_a_tensor_of_zeros_moves_like_the_smallest():
    problem = Scaled(1.0)
    bias = nn.Parameter(torch.zeros(2))
    loss_of = problem.loss_of
    settings = FitSettings(**{**SETTINGS, "steps": 1, "warmup": 0.0, "relative": True})
    fit(
        "a map with a bias",
        [problem.weight, bias],
        lambda r: loss_of(r) + (bias - 1).square().mean(),
        Course(problem.train, problem.held[:0], tokens=3),
        settings,
    )
    size = float(Scaled(1.0).weight.detach().square().mean().sqrt())
    torch.testing.assert_close(bias, torch.full((2,), SETTINGS["learning_rate"] * size))


def test_patience_ends_a_training_that_gains_no_more():
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.0, 9.0, 1.0])
    task = Regression()
    task.judge = lambda: next(losses)
    result = task.fit(patience=3)
    assert result.history == [(0, 5.0), (4, 4.0), (8, 3.0), (12, 3.5), (16, 3.0), (20, 9.0)]
    assert (result.step, result.after) == (8, 3.0)
