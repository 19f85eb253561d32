"""By cost: every target keeps its share, predictions stay within what may be lost, and one trial
corrects them."""

from __future__ import annotations

import numpy as np
import pytest

from architectures import tiny, windows
from spectrim import api
from spectrim.allocate.curve import tail_energy
from spectrim.allocate.ladder import ladders_for
from spectrim.errors import BudgetError, InputError
from spectrim.recipe import Recipe
from spectrim.recipes import get_recipe
from spectrim.run.planning import make_plan, plan_limits
from spectrim.run.survey.by_cost import energy_plan, loss_plan, predicted_nats
from spectrim.tolerances import KEEP_STEPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("by_cost") / "model"
    tiny("llama", num_hidden_layers=3)[0].save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def surveyed(folder):
    recipe = get_recipe("svd-llm").with_changes(allocate={"gradient_windows": 8})
    return recipe, api.survey(folder, recipe=recipe, text=windows(8))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_every_target_keeps_its_share_at_the_least_rank(surveyed, energy):
    recipe, survey = surveyed
    plan = energy_plan(recipe, survey, energy)
    for ladder in ladders_for(survey.curves, plan_limits(recipe, survey.dtype_bytes)):
        entry, tail = plan[ladder.curve.name], tail_energy(ladder.curve)
        if entry.rank is None:
            assert not np.any(tail[ladder.ranks] <= (1 - energy) * tail[0])
            continue
        assert tail[entry.rank] <= (1 - energy) * tail[0]
        smaller = ladder.ranks[ladder.ranks < entry.rank]
        assert not np.any(tail[smaller] <= (1 - energy) * tail[0])
    assert plan.keep == plan.achieved_keep


@pytest.mark.parametrize("rule", ["uniform", "knapsack"])
def test_the_smallest_plan_within_a_loss_and_the_next_smaller_is_not(surveyed, rule):
    recipe, survey = surveyed
    # The score that predicts nats: by another, losses need not fall with every byte.
    choice = {"rule": rule, "score": "second_order"}
    recipe = Recipe.model_validate(recipe.with_changes(allocate=choice).model_dump())
    middle = predicted_nats(
        make_plan(recipe.with_changes(keep=0.6), dtype_bytes=survey.dtype_bytes, survey=survey),
        survey,
    )
    found = loss_plan(recipe, survey, middle)
    assert predicted_nats(found, survey) <= middle
    assert found.keep <= 0.6 + 1 / KEEP_STEPS
    smaller = make_plan(
        recipe.with_changes(keep=found.keep - 2 / KEEP_STEPS),
        dtype_bytes=survey.dtype_bytes,
        survey=survey,
    )
    assert predicted_nats(smaller, survey) > middle
    assert predicted_nats(loss_plan(recipe, survey, 1e9), survey) >= middle
    assert loss_plan(recipe, survey, 1e-12).achieved_keep == 1


def test_energy_is_a_size_for_compress(folder, tmp_path):
    recipe = get_recipe("svd-llm").with_changes(allocate={"gradient_windows": 8})
    result = api.compress(
        folder, recipe=recipe, energy=0.95, text=windows(8), output=tmp_path / "out"
    )
    assert result.plan.rule == "energy"
    assert any("0.95 of what" in note for note in result.report["notes"])
    achieved = result.report["keep"]["achieved"]
    assert result.report["keep"]["asked"] == pytest.approx(achieved)


def test_a_loss_is_measured_corrected_once_and_both_are_told(folder):
    recipe = get_recipe("svd-llm").with_changes(allocate={"gradient_windows": 8})
    text = windows(8, 32)
    loss = 0.05
    result = api.compress(folder, recipe=recipe, max_loss=loss, text=text)
    (note,) = [n for n in result.report["notes"] if "asked for a loss of at most" in n]
    assert "was predicted to lose" in note and "and lost" in note
    (seen,) = result.report["measured"]["texts"]
    assert seen["compressed"]["nll"] - seen["dense"]["nll"] <= 2 * loss
    assert 0 < result.report["keep"]["achieved"] <= 1


def test_only_one_word_for_the_size(folder):
    for words in ({"keep": 0.5, "max_loss": 0.1}, {"energy": 0.9, "size": "1MB"}):
        with pytest.raises(BudgetError, match="exclude each other"):
            api.compress(folder, text=windows(4), **words)
    for words in ({"energy": 1.5}, {"max_loss": 0.0}):
        with pytest.raises(BudgetError):
            api.compress(folder, text=windows(4), **words)
    with pytest.raises(InputError, match="compresses twice"):
        api.compress(tiny("llama")[0], text=windows(4), max_loss=0.1)
    with pytest.raises(InputError, match="learns its ranks"):
        api.compress(folder, text=windows(4), recipe="acip", energy=0.9)
