"""Residuals through whole runs: exact bytes, the same model from disk, and clear refusals."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import spectrim.storage.quantizer  # noqa: F401  (teaches transformers to load the folders)
from architectures import tiny, windows
from jobs import logits
from spectrim import api
from spectrim.allocate.budget import Shape, layer_bytes
from spectrim.allocate.plan import Plan, PlanEntry
from spectrim.errors import ArtifactError, InputError, RecipeError
from spectrim.layers.quantized import wide_weight
from spectrim.layers.swap import compressed_layers
from spectrim.recipes import get_recipe
from spectrim.run.planning import plan_from_survey
from spectrim.run.survey.by_cost import predicted_nats
from spectrim.serve.prepare import prepare
from spectrim.storage.inspect import inspect_folder
from spectrim.storage.json_file import as_json
from spectrim.storage.plan_file import load_plan
from spectrim.storage.table import parse_table

WEIGHTS = "int2-g32+int8"

DOUBLE_SIDED = get_recipe("svd-llm").with_changes(
    decompose={"objective": "kfac"}, allocate={"rule": "knapsack", "score": "kfac"}
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny("llama")[0].to(torch.bfloat16).save_pretrained(folder)
    return folder


def compressed(source, recipe="spectrim", weights=WEIGHTS, **options):
    chosen = get_recipe(recipe)
    given = {"text": windows(16), "storage": "residual", "weights": weights, "measure": False}
    return api.compress(source, recipe=chosen, **{"keep": 0.35, **given, **options})


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    output = tmp_path_factory.mktemp("residual") / "out"
    return compressed(source, output=output), output


def corrected(result):
    return [entry for entry in result.plan.entries if entry.corrected]


def test_memory_folder_plan_and_report_agree(made):
    result, output = made
    assert corrected(result)
    assert all(entry.components is None for entry in result.plan.entries)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert torch.equal(logits(result.model, windows(2)), logits(loaded, windows(2)))
    found = inspect_folder(output)
    assert found.target_bytes == sum(entry.bytes for entry in result.plan.entries)
    assert found.achieved_keep <= 0.35
    targets = {target.name: target for target in found.targets}
    for entry in result.plan.entries:
        target = targets[entry.name]
        shape = Shape(target.out_features, target.in_features)
        sizes = {"rank": entry.rank, "storage": entry.storage, "weights": entry.weights}
        assert entry.bytes == target.bytes == layer_bytes(shape, **sizes)
        assert (target.storage, target.weights, target.rank) == tuple(sizes[k] for k in _FACTS)
    loaded.save_pretrained(output.parent / "again")
    again = AutoModelForCausalLM.from_pretrained(output.parent / "again", dtype="auto")
    assert torch.equal(logits(again, windows(2)), logits(loaded, windows(2)))


_FACTS = ("storage", "weights", "rank")


def test_the_result_loses_less_than_its_base_alone_by_prediction_and_in_its_layers(made, source):
    result, _ = made
    dense = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    for name, layer in compressed_layers(result.model).items():
        if layer.storage == "residual":
            W = dense.get_submodule(name).weight.float()
            assert (layer.dense_weight() - W).norm() < (wide_weight(layer.base) - W).norm()
    base = compressed(source, weights="int2-g32", storage="dense")
    assert result.plan.predicted_loss < base.plan.predicted_loss


def test_the_dense_export_is_the_sum_of_its_parts_and_other_targets_are_named(made, tmp_path):
    result, output = made
    api.export(output, output=tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    entry = corrected(result)[0]
    layer = compressed_layers(result.model)[entry.name]
    assert torch.equal(dense.get_submodule(entry.name).weight, layer.dense_weight().bfloat16())
    with pytest.raises(InputError, match=r"proj is stored residual at rank .* --storage dense"):
        api.export(output, output=tmp_path / "ct", to="compressed-tensors")


def test_a_prepared_model_with_room_has_the_sums_in_its_place(made):
    result, _ = made
    model = copy.deepcopy(result.model).float()
    before = logits(model, windows(2))
    said = prepare(model, memory="any")
    assert all(said.layers[entry.name] == "dense" for entry in corrected(result))
    torch.testing.assert_close(logits(model, windows(2)), before, rtol=1e-3, atol=1e-3)


def test_one_plan_over_all_forms_judges_residuals(source):
    survey = api.survey(
        source,
        recipe=get_recipe("spectrim").with_changes(storage={"weights": "auto"}),
        text=windows(16),
    )
    for curve in survey.curves:
        losses = curve.rounding["residual int3-g128+int8"]
        alone = float(curve.rounding["dense int3-g128"][0])
        assert losses.shape == (curve.rank + 1,)
        assert alone > float(losses[2]) > float(losses[8]) > 0
    plan = plan_from_survey(survey, keep=0.4)
    without = replace(
        survey,
        curves=tuple(
            replace(c, rounding={k: v for k, v in c.rounding.items() if "residual" not in k})
            for c in survey.curves
        ),
    )
    assert plan.predicted_loss <= plan_from_survey(without, keep=0.4).predicted_loss


def test_a_loss_that_may_be_lost_counts_what_residuals_lose(source):
    recipe = get_recipe("spectrim").with_changes(storage={"kind": "residual", "weights": WEIGHTS})
    survey = api.survey(source, recipe=recipe, text=windows(16))
    plan = plan_from_survey(survey, keep=0.35)
    assert any(entry.corrected for entry in plan.entries)
    assert predicted_nats(plan, survey) == pytest.approx(plan.predicted_loss)


@pytest.mark.parametrize("planned", [False, True])
def test_one_shot_flows_round_at_the_end(source, planned):
    if planned:
        given: dict = {"plan": _edited(source), "keep": None, "storage": None, "weights": None}
        result = compressed(source, "svd-llm", **given)
    else:
        result = compressed(source, DOUBLE_SIDED)
    assert corrected(result)
    layers = compressed_layers(result.model)
    for entry in corrected(result):
        assert layers[entry.name].rank == entry.rank
        target = next(t for t in result.report["targets"] if t["name"] == entry.name)
        assert 0 < target["stored_error"] < 0.5


def _edited(source):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    entries = []
    for name, module in model.named_modules():
        if ".layers." not in name or not isinstance(module, torch.nn.Linear):
            continue
        shape = Shape(*module.weight.shape)
        form = {"storage": "residual", "weights": WEIGHTS}
        entries.append(
            PlanEntry(
                name,
                4,
                bytes=layer_bytes(shape, rank=4, **form),
                dense_bytes=layer_bytes(shape, rank=None, storage="dense"),
                **form,
            )
        )
    return Plan(tuple(entries), 0.5, "own")


@pytest.mark.parametrize(
    ("recipe", "words", "match"),
    [
        ("spectrim", {"weights": "native"}, "begin with native"),
        ("spectrim", {"weights": "native+int8"}, "begin with native"),
        ("svd-llm", {}, "storage residual needs a rule"),
        ("acip", {}, "storage residual needs a rule"),
    ],
)
def test_what_cannot_be_is_refused(source, recipe, words, match):
    with pytest.raises(RecipeError, match=match):
        compressed(source, recipe, **{"weights": WEIGHTS, **words})


def test_files_with_a_base_in_native_numbers_or_without_a_rank_are_refused(made, tmp_path):
    result, output = made
    table = inspect_folder(output).table.to_json()
    entry = next(e for e in table["layers"].values() if e["storage"] == "residual")
    for changes, match in (({"rank": None}, "does not go with"), ({"weights": "native"}, "whole")):
        kept = dict(entry)
        entry |= changes
        with pytest.raises(ArtifactError, match=match):
            parse_table(table, source="config.json")
        entry |= kept
    path = tmp_path / "plan.json"
    path.write_text(as_json(result.plan.to_json()))
    assert load_plan(path)[0].entries == result.plan.entries
    path.write_text(path.read_text().replace(WEIGHTS, "native+int8"))
    with pytest.raises(ArtifactError, match="is not rounded"):
        load_plan(path)
