import math

import pytest
import torch

from architectures import tiny, windows
from gated_cases import lessons_of
from spectrim.errors import ArtifactError, InputError, NonFiniteError
from spectrim.learn.checkpoint import Checkpoint, load_optimizer, optimizer_tensors


def test_every_epoch_sees_each_window_once_whatever_came_before():
    model, _ = tiny("llama")
    lessons = lessons_of(model, n=6, batch=2)
    seen = [torch.cat(lessons.rows(step)) for step in range(6)]
    assert sorted(torch.cat(seen[:3]).tolist()) == list(range(6))
    assert sorted(torch.cat(seen[3:]).tolist()) == list(range(6))
    assert torch.equal(torch.cat(lessons_of(model, n=6, batch=2).rows(4)), seen[4])


def test_accumulated_gradients_are_those_of_the_larger_batch():
    large, small = tiny("llama")[0], tiny("llama")[0]
    whole = lessons_of(large, batch=4)
    parts = lessons_of(small, batch=2, accumulate=2)
    parts.rows = lambda step: list(whole.rows(step)[0].split(2))
    a = whole.backward(0, "cross_entropy", lambda _: None)
    b = parts.backward(0, "cross_entropy", lambda _: None)
    assert a == pytest.approx(b, rel=1e-5)
    for p, q in zip(large.model.layers.parameters(), small.model.layers.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-6)


def test_losses_are_those_of_the_definitions():
    model, other = tiny("llama")[0], tiny("llama")[0]
    last = other.model.layers[-1].mlp.down_proj.weight
    torch.nn.init.normal_(last, generator=torch.Generator().manual_seed(0))
    lessons = lessons_of(model, teacher=other)
    rows, ids = torch.tensor([1, 3]), windows(8)[[1, 3]]
    p, q = other(ids).logits.double().log_softmax(-1), model(ids).logits.double().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    ce = -q[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert float(lessons.loss(rows, "kl")) == pytest.approx(float(kl), rel=1e-4)
    assert float(lessons.loss(rows, "cross_entropy")) == pytest.approx(float(ce), rel=1e-5)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e6])
def test_a_diverged_loss_says_what_to_lower(loss):
    guard = lessons_of(tiny("llama")[0]).guard(4.0, "the_rate")
    guard.check(5.0, 3, "")
    with pytest.raises(NonFiniteError, match=r"step 7.*lower the_rate.*kept there"):
        guard.check(loss, 7, "kept there")


def test_a_checkpoint_of_another_recipe_names_the_difference(tmp_path):
    Checkpoint(tmp_path, {"seed": 0, "learn.batch": 4}, 1).save({}, {"step": 1})
    with pytest.raises(InputError, match=r"learn.batch: 4 there, 8 now"):
        Checkpoint(tmp_path, {"seed": 0, "learn.batch": 8}, 1).load()
    assert Checkpoint(tmp_path / "none", {}, 1).load() is None


def test_a_damaged_checkpoint_is_refused(tmp_path):
    checkpoint = Checkpoint(tmp_path, {}, 1)
    checkpoint.save({"a": torch.ones(3)}, {"step": 1})
    checkpoint.path.write_bytes(checkpoint.path.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="remove it"):
        checkpoint.load()


def test_an_optimizer_goes_on_from_its_tensors(tmp_path):
    def train(p, optimizer, steps, start):
        for i in range(start, start + steps):
            optimizer.zero_grad()
            ((p - i) ** 3).sum().backward()
            optimizer.step()

    p = torch.nn.Parameter(torch.arange(3.0))
    q = torch.nn.Parameter(torch.arange(3.0))
    whole = torch.optim.AdamW([p], lr=0.1)
    train(p, whole, 6, 0)
    first = torch.optim.AdamW([q], lr=0.1)
    train(q, first, 3, 0)
    checkpoint = Checkpoint(tmp_path, {}, 1)
    checkpoint.save(optimizer_tensors(first, "o"), {})
    second = torch.optim.AdamW([q], lr=0.1)
    load_optimizer(second, checkpoint.load()[0], "o")
    train(q, second, 3, 3)
    assert torch.equal(p, q)
