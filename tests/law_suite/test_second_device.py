"""Everything runs where it is told to: a device changes where numbers lie, not what they are.

The device is imitated (`second_device.py` says what it cannot see). Results are held to those of
the same run on the CPU, which share no placement with it.
"""

import pytest
import torch

import second_device
from architectures import tiny, windows
from jobs import logits
from quick_recipes import quick
from spectrim import api
from spectrim.layers.swap import compressed_layers
from spectrim.recipes import PRESETS
from spectrim.run.loading import load_model
from spectrim.run.options import RunOptions
from spectrim.storage.tensor_file import TensorFile
from spectrim.studies.benching import Timing, bench

pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(
        not second_device.available(), reason="no second device can be imitated beside a real one"
    ),
]

KEEP = 0.6
IN_EVERY_RUN = {"svd-llm", "zs-svd", "spectrim", "acip"}
NAMES = [
    name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.slow) for name in PRESETS
]
"""One recipe of every flow in every run, the others with `-m slow`: they meet the same code."""
TEXT = windows(8, 8)
SCORES = ("first_order", "second_order", "kfac", "measured", "table")
SAME = 1e-4
"""Relative: attention takes another path through the same arithmetic in fp32."""


@pytest.fixture
def device():
    with second_device.second_device() as device:
        yield device


def two_blocks():
    return tiny("qwen2")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model on disk, in several files."""
    place = tmp_path_factory.mktemp("model") / "dense"
    two_blocks().save_pretrained(place, max_shard_size="40KB")
    return place


def recipe_for(name, **changes):
    return quick(PRESETS[name], KEEP).with_changes(**changes)


def outputs(model):
    """Logits on the CPU, of a model anywhere."""
    return logits(model, TEXT.to(next(model.parameters()).device)).cpu().float()


def close(one, other):
    return (one - other).norm() <= SAME * other.norm()


def ranks(plan):
    return {e.name: e.rank for e in plan.entries}


def lies_on(device, model):
    return {t.device for t in model.state_dict().values()} == {device}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_runs_there_and_agrees(name, device):
    if name == "svd-llm-lora":
        pytest.importorskip("peft")
    recipe = recipe_for(name)
    there = api.compress(two_blocks(), recipe=recipe, text=TEXT, device=device)
    assert lies_on(device, there.model)
    assert there.report["keep"]["achieved"] <= KEEP
    found, dense = outputs(there.model), outputs(two_blocks())
    if recipe.learn:
        # A few steps of learning on random numbers are no model of anything yet.
        assert found.isfinite().all()
    elif recipe.refine:
        # Training there is in autocast, as on a card; it has to stay a model of the original.
        assert (found - dense).norm() < dense.norm()
    else:
        here = api.compress(two_blocks(), recipe=recipe, text=TEXT, device="cpu")
        assert ranks(there.plan) == ranks(here.plan)
        assert close(found, outputs(here.model))


@pytest.mark.parametrize(
    ("storage", "weights"),
    [
        ("factored", "native"),
        ("packed", "native"),
        ("packed", "int8"),
        ("factored", "int4"),
        ("auto", "int4+int8"),
    ],
)
def test_every_storage_and_format_is_its_restored_matrix(storage, weights, device, tmp_path):
    api.compress(
        two_blocks(),
        recipe=recipe_for("svd"),
        storage=storage,
        weights=weights,
        device=device,
        text=TEXT,
        output=tmp_path / "out",
    )
    loaded = load_model(tmp_path / "out", RunOptions(device=device)).model
    assert lies_on(device, loaded) and compressed_layers(loaded)
    exported = api.export(tmp_path / "out", output=tmp_path / "dense")
    dense = load_model(exported, RunOptions(device="cpu")).model
    assert close(outputs(loaded), outputs(dense))


def test_survey_plan_and_every_size_cut_from_it(folder, device, tmp_path):
    options = {"recipe": recipe_for("zs-svd", refine=[]), "text": TEXT, "scores": SCORES}
    there = api.survey(folder, output=tmp_path / "survey", device=device, **options)
    here = api.survey(folder, device="cpu", **options)
    for one, other in zip(there.curves, here.curves, strict=True):
        assert one.energy == pytest.approx(other.energy, rel=SAME, abs=SAME * other.energy[0])
    plan = api.plan(tmp_path / "survey", keep=KEEP, rule="knapsack", score="second_order")
    cut = api.compress(
        folder, recipe=options["recipe"], plan=plan, survey=there, device=device, text=TEXT
    )
    sized = api.resize(tmp_path / "survey", keep=KEEP, score="second_order", device=device)
    assert lies_on(device, cut.model) and lies_on(device, sized.model)
    api.elastic(tmp_path / "survey", tmp_path / "elastic", score="second_order")
    models = {}
    for place in (device, "cpu"):
        opened = api.load_elastic(tmp_path / "elastic", device=str(place))
        opened.resize(KEEP)
        models[str(place)] = opened.model
    assert lies_on(device, models[str(device)])
    assert close(outputs(models[str(device)]), outputs(models["cpu"]))
    settled = api.resize(tmp_path / "elastic", keep=0.8, device=str(device))
    assert lies_on(device, settled.model)


def test_evaluation_and_timing(folder, device, tmp_path):
    api.compress(folder, recipe=recipe_for("svd"), text=TEXT, device=device, output=tmp_path / "o")
    found = [
        api.evaluate(tmp_path / "o", against=folder, text=TEXT, device=place)
        for place in (device, "cpu")
    ]
    one, other = (next(iter(f["perplexity"].values()))["perplexity"] for f in found)
    assert one == pytest.approx(other, rel=SAME)
    timing = Timing(batches=(1,), lengths=(4,), new_tokens=2, repeats=1)
    timed = bench(tmp_path / "o", folder, RunOptions(device="far"), timing)
    assert timed["protocol"]["device"].startswith("far")


def test_adapters_and_healing(folder, device, tmp_path):
    api.compress(folder, recipe=recipe_for("svd"), text=TEXT, device=device, output=tmp_path / "o")
    left = [
        api.adapter(tmp_path / "o", folder, rank=3, text=TEXT, device=place).facts["left"]
        for place in (device, "cpu")
    ]
    assert left[0] == pytest.approx(left[1], rel=10 * SAME)
    healed = api.heal(tmp_path / "o", text=TEXT, steps=2, batch=4, device=device)
    assert lies_on(device, healed.model)
    assert healed.report["healing"][-1]["after"] <= healed.report["healing"][-1]["before"]


def tensors(place):
    files = [TensorFile(path) for path in sorted(place.glob("*.safetensors"))]
    return {name: file.read(name) for file in files for name in file.entries}


@pytest.mark.parametrize(
    "name", ["spectrim", pytest.param("spectrim-balanced", marks=pytest.mark.slow)]
)
def test_out_of_core_gives_the_bytes_of_a_model_in_memory(name, folder, device, tmp_path):
    for place, lazily in (("a", False), ("b", True)):
        api.compress(
            folder,
            recipe=recipe_for(name),
            text=TEXT,
            device=device,
            output=tmp_path / place,
            out_of_core=lazily,
        )
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


class Stopped(Exception):
    pass


class StopsAt:
    """Progress that ends a run at the n-th step of all stages."""

    def __init__(self, steps):
        self.left = steps

    def start(self, stage, total):
        pass

    def advance(self, stage, note=""):
        self.left -= 1
        if not self.left:
            raise Stopped

    def finish(self, stage):
        pass


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(folder, device, tmp_path):
    options = {"recipe": recipe_for("spectrim-balanced"), "text": TEXT, "device": device}
    with pytest.raises(Stopped):
        api.compress(folder, output=tmp_path / "a", progress=StopsAt(15), **options)
    assert (tmp_path / "a.work").exists()
    api.compress(folder, output=tmp_path / "a", **options)
    api.compress(folder, output=tmp_path / "b", **options)
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(one[k], other[k]) for k in one)
