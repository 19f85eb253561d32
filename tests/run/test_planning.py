"""Plans from surveys: every rule, any size, without torch; and what is cut from them."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from architectures import BLOCKS, tiny, windows
from jobs import logits, make_job
from spectrim import api
from spectrim.allocate.budget import Shape
from spectrim.allocate.checking import check_plan
from spectrim.allocate.curve import Curve
from spectrim.allocate.knapsack import knapsack
from spectrim.allocate.ladder import Limits, largest_rank
from spectrim.allocate.sensitivity import candidate_ranks
from spectrim.allocate.zero_sum import zero_sum
from spectrim.errors import ArtifactError, BudgetError, InputError, OutputError
from spectrim.recipe import Allocation, Recipe
from spectrim.run.planning import make_plan, plan_from_survey
from spectrim.run.survey.replanning import read_plan
from spectrim.run.survey.survey import make_survey
from spectrim.storage.survey_record import Survey

ALL = ("first_order", "second_order", "kfac", "measured")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model on disk, and its survey."""
    place = tmp_path_factory.mktemp("survey")
    model, _ = tiny("llama")
    model.save_pretrained(place / "model")
    api.survey(
        place / "model", output=place / "survey", recipe="svd-llm", text=windows(6), scores=ALL
    )
    return place


def invented(stability):
    """A survey of four targets with given sign stability."""
    rng = np.random.default_rng(1)
    curves = []
    for i in range(4):
        energy = np.sort(rng.random(12))[::-1].copy()
        score = rng.standard_normal(12) * energy
        shape = Shape(12, 16)
        curves.append(Curve(f"b.{i}.q", i, "q", shape, energy, float(energy.sum()), 0.0, score))
    return Survey(
        key=None,
        model_name="invented",
        curves=tuple(curves),
        losses={},
        dtype_bytes=2,
        other_bytes=1000,
        recipe=Recipe(name="test", keep=0.6).model_dump(mode="json"),
        facts={"sign_stability": {c.name: stability for c in curves}},
    )


@pytest.mark.parametrize(
    ("rule", "score", "needed"),
    [
        ("uniform", "kfac", set()),
        ("loss_ratio", "energy", set()),
        ("zero_sum", "energy", {"first_order"}),
        ("knapsack", "energy", set()),
        ("knapsack", "kfac", {"kfac"}),
        ("sensitivity", "measured", {"table"}),
        ("sensitivity", "energy", set()),
    ],
)
def test_a_rule_asks_for_what_it_reads(rule, score, needed):
    assert Allocation(rule=rule, score=score).needed_scores == needed


@pytest.mark.parametrize("rule", ["uniform", "loss_ratio", "zero_sum", "knapsack", "sensitivity"])
def test_every_rule_stays_within_its_bytes(folders, rule):
    for keep in (0.5, 0.8):
        made = api.plan(folders / "survey", keep=keep, rule=rule)
        assert made.achieved_keep <= keep
        assert made.achieved_keep > keep - 0.02
        assert made.keep == keep and made.rule == rule


def test_every_score_can_be_minimized(folders):
    plans = {s: api.plan(folders / "survey", keep=0.6, rule="knapsack", score=s) for s in ALL}
    assert len({tuple(e.rank for e in p.entries) for p in plans.values()}) > 1
    best = api.plan(folders / "survey", keep=0.6, rule="knapsack")
    assert best == plans["kfac"]


def test_a_survey_plans_what_the_rule_plans():
    survey = invented(0.9)
    recipe = Recipe.model_validate(survey.recipe)
    limits = Limits(floor=0.3, multiple=2)
    changed = {"floor": 0.3, "multiple": 2}
    for rule, expected in (
        ("knapsack", knapsack(survey.curves, keep=0.6, limits=limits)),
        ("zero_sum", zero_sum(survey.curves, keep=0.6, limits=limits)),
    ):
        score = "energy" if rule == "knapsack" else None
        found = plan_from_survey(survey, rule=rule, score=score, **changed)
        assert found == expected
        changed_recipe = recipe.with_changes(allocate={"rule": rule, **changed})
        assert make_plan(changed_recipe, dtype_bytes=2, survey=survey) == expected


def test_signs_that_are_noise_are_not_balanced():
    survey = invented(0.5)
    recipe = Recipe.model_validate(survey.recipe).with_changes(allocate={"rule": "zero_sum"})
    found = make_plan(recipe, dtype_bytes=2, survey=survey)
    expected = zero_sum(survey.curves, keep=0.6, key="magnitude")
    assert found.entries == expected.entries
    assert any("50%" in note for note in found.notes)
    faithful = recipe.with_changes(allocate={"faithful": True})
    published = zero_sum(survey.curves, keep=0.6, faithful=True)
    assert make_plan(faithful, dtype_bytes=2, survey=survey) == published


def test_a_size_is_that_of_the_whole_checkpoint():
    survey = invented(0.9)
    dense = sum(2 * 12 * 16 for _ in survey.curves)
    made = plan_from_survey(survey, size=1000 + int(0.7 * dense), rule="knapsack")
    assert 1000 + sum(e.bytes for e in made.entries) <= 1000 + int(0.7 * dense)
    assert made.keep == pytest.approx(0.7, abs=0.002)
    with pytest.raises(BudgetError, match="cannot be reached"):
        plan_from_survey(survey, size=999)
    with pytest.raises(BudgetError, match="exclude each other"):
        plan_from_survey(survey, size=2000, keep=0.5)


def test_what_a_survey_lacks_is_said():
    survey = invented(0.9)
    with pytest.raises(InputError, match="no score 'kfac'"):
        plan_from_survey(survey, rule="knapsack", score="kfac")
    with pytest.raises(InputError, match="no measured sensitivities"):
        plan_from_survey(survey, rule="sensitivity", score="measured")
    recipe = Recipe(name="test", allocate=Allocation(rule="loss_ratio"))
    with pytest.raises(InputError, match="needs a survey"):
        make_plan(recipe, dtype_bytes=2, curves=survey.curves)


def test_candidates_and_largest_ranks_are_within_their_bytes():
    shape = Shape(30, 50)
    ranks = candidate_ranks(Curve("t", 0, "q", shape), Limits())
    assert {k: r for k, r in ranks.items()} == {
        k: int(k * 1500 + 1e-9) // 80 for k in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    }
    assert largest_rank(shape, Limits()) == 18  # 18 * 80 < 1500 <= 19 * 80
    assert largest_rank(Shape(1, 50), Limits()) == 1


def test_a_plan_for_another_model_is_refused():
    job = make_job(count=2, flow="one-shot")
    survey = invented(0.9)
    with pytest.raises(BudgetError, match="another model: 18 targets do not match"):
        check_plan(plan_from_survey(survey, rule="uniform"), job.anatomy)


def test_planning_does_not_import_torch():
    modules = "spectrim.run.survey.replanning, spectrim.cli.plan"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_plan_file_brings_its_decompositions(folders, tmp_path, monkeypatch, capsys):
    from spectrim.cli.plan import plan as plan_command

    plan_command(folders / "survey", keep=0.6, rule="knapsack", output=tmp_path / "plan.json")
    shown = capsys.readouterr().out
    assert "kept bytes" in shown and "predicted loss" in shown and "self_attn.q_proj" in shown
    chosen, survey = read_plan(tmp_path / "plan.json")
    assert survey is not None and chosen == api.plan(folders / "survey", keep=0.6, rule="knapsack")
    forbidden = pytest.fail

    monkeypatch.setattr(
        "spectrim.run.parts.cutting.decompose", lambda *a, **k: forbidden("decomposed")
    )
    monkeypatch.setattr("spectrim.run.opening.gather_windows", lambda *a, **k: forbidden("read"))
    result = api.compress(folders / "model", plan=tmp_path / "plan.json", recipe="svd-llm")
    assert result.plan == chosen
    assert result.report["calibration"]["windows"] == 6
    resized = api.resize(folders / "survey", keep=0.6, score="kfac", output=tmp_path / "out")
    assert resized.plan.entries == chosen.entries
    same = logits(resized.model, windows(2)), logits(result.model, windows(2))
    torch.testing.assert_close(*same)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_commands_hand_on_to_each_other(folders, tmp_path, capsys):
    from spectrim.cli.compress import compress
    from spectrim.cli.plan import plan
    from spectrim.cli.resize import resize
    from spectrim.cli.survey import survey

    survey(
        str(folders / "model"),
        tmp_path / "survey",
        recipe="svd-llm",
        text="self",
        windows=4,
        window_length=12,
        scores="kfac",
        quiet=True,
    )
    shown = capsys.readouterr().out
    assert "energy, kfac" in shown and "next" in shown
    plan(tmp_path / "survey", keep=0.7, rule="knapsack", as_json=True)
    made = json.loads(capsys.readouterr().out)
    assert made["rule"] == "knapsack" and len(made["entries"]) == 7 * BLOCKS
    plan(tmp_path / "survey", keep=0.7, multiple=4, floor=0.2, output=tmp_path / "p.json")
    with pytest.raises(OutputError, match="exists"):
        plan(tmp_path / "survey", keep=0.7, output=tmp_path / "p.json")
    compress(
        str(folders / "model"),
        tmp_path / "out",
        plan=tmp_path / "p.json",
        recipe="svd-llm",
        quiet=True,
    )
    assert (tmp_path / "out" / "config.json").is_file()
    resize(tmp_path / "survey", tmp_path / "other", keep=0.5, quiet=True)
    assert (tmp_path / "other" / "config.json").is_file()
    assert "0.5" in capsys.readouterr().out


def test_a_plan_file_may_outlive_its_survey(folders, tmp_path):
    made = api.plan(folders / "survey", keep=0.6)
    (tmp_path / "p.json").write_text(json.dumps({**made.to_json(), "survey": "/gone"}))
    assert read_plan(tmp_path / "p.json") == (made, None)
    (tmp_path / "q.json").write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object"):
        read_plan(tmp_path / "q.json")


def test_a_survey_of_another_model_or_objective_is_refused(folders, tmp_path):
    model, _ = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ArtifactError, match="differs in model"):
        api.compress(model, survey=folders / "survey", recipe="svd-llm", keep=0.6)
    with pytest.raises(ArtifactError, match=r"decompose\.objective"):
        api.compress(folders / "model", survey=folders / "survey", recipe="svd", keep=0.6)


def test_a_sequential_recipe_takes_its_ranks_from_the_survey(folders):
    made = api.plan(folders / "survey", keep=0.6, rule="knapsack")
    recipe = api.resolve_recipe("aa-svd").with_changes(refine=[], decompose={"blend": 0.5})
    result = api.compress(
        folders / "model", recipe=recipe, plan=made, survey=folders / "survey", text=windows(6)
    )
    assert result.plan.entries == made.entries


def test_rules_survey_the_model_themselves():
    job = make_job(count=6, flow="one-shot", allocate={"rule": "knapsack", "score": "second_order"})
    survey = make_survey(job)
    assert "second_order" in survey.scores
    model, _ = tiny("llama")
    recipe = job.recipe.with_changes(allocate={"gradient_windows": 4})
    result = api.compress(model, recipe=recipe, text=windows(6), keep=0.5)
    assert result.plan.rule == "knapsack" and result.plan.achieved_keep <= 0.5
    assert dataclasses.asdict(result.plan)["rule"] == "knapsack"
