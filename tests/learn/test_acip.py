from dataclasses import replace

import pytest
import torch

from architectures import tiny, windows
from gated_cases import gated_model, lessons_of
from spectrim.errors import BudgetError, NonFiniteError
from spectrim.learn.acip import PruningSettings, prune
from spectrim.learn.checkpoint import Checkpoint
from spectrim.learn.gates import ALIVE
from spectrim.learn.healing import HealingSettings, apply_plan, heal, order_by_death

PRUNING = {
    "stop_keep": 0.5,
    "gate_scale": 0.02,
    "gate_dtype": "float32",
    "learning_rate": 3e-3,
    "lora_learning_rate": 2e-3,
    "clip": 1.0,
    "pressure": 1e-3,
    "pressure_growth": 1.3,
    "pressure_every": 1,
    "steps": 16,
    "max_steps": 40,
    "weigh_by_cost": True,
    "size_every": 1,
}
HEALING = HealingSettings(
    steps=5,
    parts="factors",
    sizes="sampled",
    objective="kl",
    learning_rate=1e-3,
    factor_learning_rate=1e-4,
    final_learning_rate=0.1,
    clip=1.0,
    grid=4,
)


class Killed(Exception):
    pass


def killer(stage, step):
    def report(found, at, total, note):
        if (found, at) == (stage, step):
            raise Killed

    return report


def run(
    *,
    checkpoint=None,
    report=lambda *_: None,
    dtype=torch.float32,
    healing=HEALING,
    **changes,
):
    model, gated = gated_model(rank=1, dropout=0.1, dtype=dtype)
    lessons = lessons_of(model, teacher=model)
    settings = PruningSettings(**{**PRUNING, **changes})
    pruned = prune(gated, lessons, settings, checkpoint=checkpoint, report=report)
    masked = None
    if report.__name__ == "<lambda>":
        masked = [p.clone() for p in gated.spans.split(pruned.deaths.alive)]
    order = order_by_death(gated, pruned.deaths)
    heal(gated, order, pruned, lessons, healing, checkpoint=checkpoint, report=report)
    return model, gated, pruned, order, masked


@pytest.fixture(scope="module")
def trained():
    return run()


def everything(outcome):
    _, gated, pruned, order, _ = outcome
    layers = gated.layers.values()
    parts = [x.up for x in layers] + [x.down for x in layers] + gated.corrections()
    deaths = pruned.deaths
    return [*parts, deaths.died, deaths.value, deaths.mean_square, torch.from_numpy(order.target)]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(everything(one), everything(other), strict=True))


def test_training_reaches_its_stop_and_counts_deaths(trained):
    _, _, pruned, order, masked = trained
    assert pruned.done and order.smallest_keep <= PRUNING["stop_keep"]
    died = pruned.deaths.died
    assert (died[died != ALIVE] >= 1).all() and died.max() <= pruned.step
    assert sum(int(m.sum()) for m in masked) == int((died == ALIVE).sum())


def test_the_smallest_size_is_the_trained_end(trained):
    _, _, _, order, masked = trained
    plan = order.plan(order.smallest_keep)
    for entry, alive in zip(plan.entries, masked, strict=True):
        rank = int(alive.sum()) + 1
        if entry.rank is not None:
            assert entry.rank == rank
    with pytest.raises(BudgetError, match=f"{order.smallest_keep:.6f}"):
        order.plan(order.smallest_keep - 0.01)


def test_the_same_seed_gives_the_same_training(trained):
    assert same(trained, run())


@pytest.mark.parametrize("moment", [("prune", 9), ("heal", 3)])
def test_a_killed_training_resumes_to_the_same_result(trained, moment, tmp_path):
    checkpoint = Checkpoint(tmp_path, {"seed": 0}, 2)
    with pytest.raises(Killed):
        run(checkpoint=checkpoint, report=killer(*moment))
    assert checkpoint.path.exists()
    assert same(trained, run(checkpoint=checkpoint))


def test_resizing_is_the_mask_of_training():
    """Slices of the ordered factors compute what gates over all components computed."""
    corrections = replace(HEALING, parts="corrections")
    model, gated, pruned, order, _ = run(dtype=torch.float64, healing=corrections)
    plan = order.plan(0.6)
    apply_plan(gated, plan)
    ids = windows(2)
    with torch.no_grad():
        sliced = model(ids).logits
    # The same size as gates on a fresh copy: alive is what died last, dense is the original.
    other, full = gated_model(rank=1, dropout=0.1, dtype=torch.float64)
    for (name, layer), entry in zip(full.layers.items(), plan.entries, strict=True):
        trained = gated.layers[name]
        layer.lora.load_state_dict(trained.lora.state_dict())
        if entry.rank is None:
            layer.rank = None
            continue
        part = list(full.layers).index(name)
        keys = pruned.deaths.keys(gated_spans(full))[part]
        rows = list(zip(*(k.tolist() for k in keys), range(layer.components, 0, -1), strict=True))
        kept = sorted(range(layer.components), key=lambda i: rows[i])[-(entry.rank - 1) :]
        layer.gate = torch.zeros(layer.components, dtype=torch.float64)
        layer.gate[kept] = 1.0
    with torch.no_grad():
        assert torch.allclose(other(ids).logits, sliced, atol=1e-10)


def gated_spans(gated):
    return gated.spans


def test_keep_one_is_the_original_exactly(trained):
    model, gated, _, order, _ = trained
    apply_plan(gated, order.plan(1.0))
    with torch.no_grad():
        assert torch.equal(model(windows(2)).logits, tiny("llama")[0](windows(2)).logits)


def test_published_settings_train_too():
    outcome = run(
        gate_dtype="bfloat16", weigh_by_cost=False, steps=None, pressure=0.1, max_steps=12
    )
    assert outcome[2].step <= 12
    assert (outcome[2].deaths.died != ALIVE).any()


def test_a_diverging_training_stops_and_keeps_the_checkpoint(tmp_path):
    checkpoint = Checkpoint(tmp_path, {}, 1)
    with pytest.raises(NonFiniteError, match=r"lower learning_rate.*checkpoint is kept in"):
        run(checkpoint=checkpoint, lora_learning_rate=1e6, clip=None)
    assert checkpoint.load() is not None
