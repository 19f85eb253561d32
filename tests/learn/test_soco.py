import pytest
import torch

from architectures import windows
from gated_cases import gated_model, lessons_of
from spectrim.learn.checkpoint import Checkpoint
from spectrim.learn.scores import SocoSettings, gates_of
from spectrim.learn.soco import learn_scores
from spectrim.learn.survivors import RecoverySettings, choose, fixed_choice, folded, recover

SETTINGS = {
    "keep": 0.5,
    "parts": "all",
    "score": "sigmoid",
    "threshold": 0.5,
    "learning_rate": 0.1,
    "deviation_learning_rate": 1e-3,
    "clip": 1.0,
    "warmup_steps": 2,
    "explore_steps": 16,
    "oscillate_steps": 8,
    "sparsify_steps": 8,
    "pressure_growth": 1.3,
    "pressure_cap": 1.0,
    "sparsity": 1.0,
    "hysteresis": 0.02,
    "settled": 0.99,
    "undecided": 0.001,
    "dead_after": 3,
    "hard": True,
    "sensitivity_steps": 4,
}
RECOVERY = {
    "steps": 4,
    "score": "sigmoid",
    "rescale": True,
    "learning_rate": 0.02,
    "deviation_learning_rate": 1e-3,
    "clip": 1.0,
    "first_step": 0,
}


class Killed(Exception):
    pass


def prepared(name="llama", **options):
    model, gated = gated_model(name, **options)
    with torch.no_grad():
        expected = model(windows(8)).logits
    lessons = lessons_of(model, teacher=model)
    return model, gated, lessons, expected


def learned(parts="all", *, checkpoint=None, report=lambda *_: None, name="llama"):
    model, gated, lessons, _ = prepared(name, deviation=True)
    settings = SocoSettings(**{**SETTINGS, "parts": parts})
    state = learn_scores(gated, lessons, settings, checkpoint=checkpoint, report=report)
    return model, gated, lessons, settings, state


@pytest.fixture(scope="module")
def whole():
    model, gated, lessons, settings, state = learned()
    theta = state.theta.detach().clone()
    plan, kept = choose(gated, state, settings)
    recovery = RecoverySettings(**{**RECOVERY, "first_step": state.step})
    scores, losses = recover(gated, plan, kept, theta, lessons, recovery)
    return model, gated, state, plan, kept, scores, losses


def test_phases_come_in_order_and_reach_the_budget(whole):
    _, _, state, plan, _, _, _ = whole
    kept = [keep for _, _, keep in state.history]
    assert state.phase == "done" and state.dead.any()
    assert min(kept) < 0.7
    assert plan.achieved_keep <= 0.5


def test_the_budget_is_met_within_one_component(whole):
    _, gated, _, plan, _, _, _ = whole
    left = (0.5 - plan.achieved_keep) * sum(e.dense_bytes for e in plan.entries)
    steps = [
        4 * (x.out_features + x.in_features)
        for x, e in zip(gated.layers.values(), plan.entries, strict=True)
        if e.rank is not None
    ]
    assert 0 <= left < min(steps)


def test_survivors_keep_their_scores_and_fold_into_plain_factors(whole):
    model, gated, _, plan, _, scores, _ = whole
    ids = windows(2)
    with torch.no_grad():
        expected = model(ids).logits
    for (name, layer), part, entry in zip(gated.layers.items(), scores, plan.entries, strict=True):
        if entry.rank is None:
            continue
        result = folded(layer, part)
        assert result.up.shape[1] == entry.rank == part.numel()
        dense = layer.up @ torch.diag(part) @ layer.down
        assert torch.allclose(result.up @ result.down, dense, atol=1e-5)
        linear = torch.nn.Linear(layer.in_features, layer.out_features, result.bias is not None)
        linear.weight = torch.nn.Parameter(result.up @ result.down)
        if result.bias is not None:
            linear.bias = torch.nn.Parameter(result.bias)
        model.set_submodule(name, linear)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, expected, atol=1e-3)
    assert not torch.allclose(torch.cat(scores), torch.ones(1), atol=1e-2)


def test_the_deviation_folds_into_the_bias():
    _, gated, _, _ = prepared("gpt2", deviation=True)
    layer = next(iter(gated.layers.values()))
    torch.nn.init.normal_(layer.deviation, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result = folded(layer, torch.ones(layer.components))
        expected = layer(x)
    assert torch.allclose(x @ (result.up @ result.down).T + result.bias, expected, atol=1e-4)


def test_selection_alone_has_gates_of_zero_and_one():
    _, gated, lessons, settings, state = learned("selection")
    gates = gates_of(state, settings)
    assert set(gates.detach().tolist()) <= {0.0, 1.0}
    assert gates.requires_grad
    plan, kept = choose(gated, state, settings)
    recovery = RecoverySettings(**{**RECOVERY, "rescale": False})
    scores, losses = recover(gated, plan, kept, None, lessons, recovery)
    assert losses == []
    assert all((part == 1).all() for part in scores)


def test_allocation_alone_keeps_leading_components():
    _, gated, _, settings, state = learned("allocation")
    plan, kept = choose(gated, state, settings)
    assert len({e.rank for e in plan.entries}) > 2
    for entry, index in zip(plan.entries, kept, strict=True):
        assert sorted(index.tolist()) == list(range(entry.rank or 0))


def test_rescaling_alone_trains_scores_of_a_uniform_plan():
    _, gated, lessons, _ = prepared()
    plan, kept = fixed_choice(gated, 0.5)
    rows = torch.arange(8)
    recovery = RecoverySettings(**{**RECOVERY, "steps": 12})
    scores, _ = recover(gated, plan, kept, None, lessons, recovery)
    after = lessons.measure(rows, "kl")
    gated.bind(None)
    assert after < lessons.measure(rows, "kl")
    assert [part.numel() for part in scores] == [e.rank or 0 for e in plan.entries]


def test_a_killed_training_resumes_to_the_same_result(whole, tmp_path):
    def killer(stage, step, total, note):
        if step >= 20:
            raise Killed

    checkpoint = Checkpoint(tmp_path, {}, 3)
    with pytest.raises(Killed):
        learned(checkpoint=checkpoint, report=killer)
    state = learned(checkpoint=checkpoint)[-1]
    uninterrupted = whole[2]
    assert state.step == uninterrupted.step
    assert torch.equal(state.theta, uninterrupted.theta)
    assert torch.equal(state.dead, uninterrupted.dead)
    assert torch.equal(state.mean_square, uninterrupted.mean_square)


def test_a_killed_recovery_resumes_to_the_same_scores(tmp_path):
    def run(checkpoint=None, report=lambda *_: None):
        _, gated, lessons, _ = prepared(deviation=True)
        plan, kept = fixed_choice(gated, 0.5)
        settings = RecoverySettings(**{**RECOVERY, "steps": 7})
        options = {"checkpoint": checkpoint, "report": report}
        return recover(gated, plan, kept, None, lessons, settings, **options)

    def killer(stage, step, total, note):
        if step == 5:
            raise Killed

    checkpoint = Checkpoint(tmp_path, {}, 2, "recovery.safetensors")
    with pytest.raises(Killed):
        run(checkpoint, killer)
    assert checkpoint.path.exists()
    (scores, losses), (expected, whole) = run(checkpoint), run()
    assert losses == whole and len(losses) == 7
    assert all(torch.equal(a, b) for a, b in zip(scores, expected, strict=True))


def test_nothing_is_trained_where_everything_stays_dense():
    model, gated, lessons, expected = prepared("qwen2", deviation=True)
    plan, kept = fixed_choice(gated, 1.0)
    _, losses = recover(gated, plan, kept, None, lessons, RecoverySettings(**RECOVERY))
    assert losses == []
    with torch.no_grad():
        assert torch.allclose(model(windows(8)).logits, expected, atol=1e-3)
