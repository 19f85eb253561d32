"""Gradient statistics against autograd on the weights, and against finite differences."""

import pytest
import torch

from gradient_cases import T, at_once, by_block, prepared, recomputed
from spectrim.errors import NonFiniteError
from spectrim.model.weights import get_module, read_weight, write_weight
from spectrim.moments.gradients import gradient_pass


def summed(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    flat = logits.reshape(-1, logits.shape[-1])
    return torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="sum")


def weight_gradients(model, anatomy, ids):
    """Gradients of the summed loss from autograd on the parameters, (out, in)."""
    parameters = {t.name: get_module(model, t.name).weight for t in anatomy.targets}
    with torch.enable_grad():
        found = torch.autograd.grad(summed(model, ids), list(parameters.values()))
    transposed = {t.name: t.transposed for t in anatomy.targets}
    return {n: g.mT if transposed[n] else g for n, g in zip(parameters, found, strict=True)}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_gradients_and_fisher_weights_are_autograds(name):
    model, anatomy, ids = prepared(name)
    found = gradient_pass(model, anatomy, ids, needs={"gradient", "fisher"}, batch=3)
    by_window = [weight_gradients(model, anatomy, ids[i : i + 1]) for i in range(len(ids))]
    for target in anatomy.targets:
        output = found.outputs[target.name]
        assert output.windows == len(ids)
        grads = torch.stack([w[target.name] for w in by_window])
        torch.testing.assert_close(output.gradient, grads.sum(0))
        torch.testing.assert_close(output.fisher_in, grads.square().sum((0, 1)))
        torch.testing.assert_close(output.fisher_out, grads.square().sum((0, 2)))
    assert found.tokens == len(ids) * (T - 1)
    assert found.loss == pytest.approx(float(summed(model, ids).detach()))


def test_output_moments_are_autograds_per_token():
    model, anatomy, ids = prepared(count=3)
    found = gradient_pass(model, anatomy, ids, needs={"G"}, batch=2)
    kept = {}

    def keep(name):
        def hook(_module, _args, output):
            output.retain_grad()
            kept[name] = output

        return hook

    handles = [
        get_module(model, t.name).register_forward_hook(keep(t.name)) for t in anatomy.targets
    ]
    with torch.enable_grad():
        summed(model, ids).backward()
    for handle in handles:
        handle.remove()
    for target in anatomy.targets:
        g = kept[target.name].grad.flatten(0, 1)
        assert found.outputs[target.name].tokens == g.shape[0]
        torch.testing.assert_close(found.outputs[target.name].G, g.mT @ g)


def test_clipping_limits_single_tokens_only():
    model, anatomy, ids = prepared(count=2)
    free = gradient_pass(model, anatomy, ids, needs={"G"})
    loose = gradient_pass(model, anatomy, ids, needs={"G"}, clip=1e6)
    tight = gradient_pass(model, anatomy, ids, needs={"G"}, clip=1.0)
    for name, output in free.outputs.items():
        torch.testing.assert_close(loose.outputs[name].G, output.G)
        assert tight.outputs[name].G.trace() < output.G.trace()


def test_input_moments_come_along():
    model, anatomy, ids = prepared()
    found = gradient_pass(model, anatomy, ids, needs=(), input_needs={"C"}, batch=3)
    group = next(iter(anatomy.groups()))
    rows = []
    module = get_module(model, group.targets[0].name)
    handle = module.register_forward_pre_hook(lambda _m, args: rows.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    x = torch.cat(rows)
    torch.testing.assert_close(found.inputs[group.targets[0].name].C, x.mT @ x)


def test_component_scores_predict_small_changes_of_the_loss():
    """Scaling component i by 1 - 1e-3 changes the mean loss by 1e-3 dL_i, to 1 %."""
    model, anatomy, ids = prepared(num_hidden_layers=3)
    factors = {}
    for target in anatomy.targets:
        U, s, Vh = torch.linalg.svd(read_weight(get_module(model, target.name)))
        r = len(s)
        factors[target.name] = (U[:, :r], s[:, None] * Vh[:r])
    found = gradient_pass(model, anatomy, ids, needs=(), factors=factors.get, batch=3)
    tokens = found.tokens
    for target in anatomy.targets[3:10:2]:
        module = get_module(model, target.name)
        W = read_weight(module).clone()
        up, down = factors[target.name]
        scores = found.scores[target.name].first
        for i in (0, 5, up.shape[1] - 1):
            component = up[:, i : i + 1] @ down[i : i + 1]
            losses = []
            for sign in (-1, 1):
                write_weight(module, W + sign * 1e-3 * component)
                with torch.no_grad():
                    losses.append(float(summed(model, ids)) / tokens)
            write_weight(module, W)
            dropped = (losses[0] - losses[1]) / 2e-3
            assert float(scores[i]) == pytest.approx(dropped, rel=0.01, abs=1e-9)


def test_halves_and_squares_are_those_of_the_windows():
    model, anatomy, ids = prepared()
    target = anatomy.targets[4]
    W = read_weight(get_module(model, target.name))
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    factors = {target.name: (U, s[:, None] * Vh)}
    found = gradient_pass(model, anatomy, ids, needs=(), factors=factors.get, batch=3)
    changes = torch.stack(
        [
            -(
                (U.mT @ weight_gradients(model, anatomy, ids[i : i + 1])[target.name])
                * factors[target.name][1]
            ).sum(1)
            for i in range(len(ids))
        ]
    ) / (T - 1)
    scores = found.scores[target.name]
    torch.testing.assert_close(scores.first, changes.mean(0))
    torch.testing.assert_close(
        scores.halves, torch.stack([changes[::2].mean(0), changes[1::2].mean(0)])
    )
    torch.testing.assert_close(scores.squares, changes.square().mean(0))
    assert 0 <= scores.sign_stability <= 1


@pytest.mark.parametrize("run", [at_once, by_block, recomputed])
def test_the_model_is_left_as_it_was(run):
    model, anatomy, ids = prepared(count=2)
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)  # transformers leaves hooks of its own, once
    hooks = [len(m._forward_hooks) for m in model.modules()]
    for _ in run(model, anatomy, ids, needs={"G"}):
        assert all(m.training for m in model.modules())
    assert {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()} == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize("run", [at_once, by_block, recomputed])
def test_a_gradient_that_is_not_finite_is_refused_by_name(run):
    model, anatomy, ids = prepared(count=2)
    name = anatomy.targets[1].name
    module = get_module(model, name)
    handle = module.register_full_backward_pre_hook(lambda _m, g: (g[0] * float("nan"),))
    with pytest.raises(NonFiniteError, match=f"non-finite gradient at {name}"):
        list(run(model, anatomy, ids, needs={"G"}))
    handle.remove()
