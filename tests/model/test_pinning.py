"""A second pass sends every token where the first one did, with scores of its own."""

import pytest
import torch

from architectures import mixture, windows
from spectrim.errors import ModelError
from spectrim.model.pinning import Pins, same_choices


def test_pinned_choices_are_repeated_with_the_scores_of_the_second_pass():
    first, second = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[0.1, 0.2, 0.3]])
    pins = Pins()
    with pins.writing():
        assert torch.topk(first, 2).indices.tolist() == [[0, 2]]
        first.max(dim=-1, keepdim=True)
        first.max(-1)
    with pins.repeating():
        values, indices = second.topk(2, dim=-1)
        kept = second.max(dim=-1, keepdim=True)
        bare = second.max(-1)
    assert indices.tolist() == [[0, 2]]
    assert torch.equal(values, torch.tensor([[0.1, 0.3]]))
    assert kept.values.tolist() == [[pytest.approx(0.1)]]
    assert bare.values.tolist() == [pytest.approx(0.1)]
    assert second.topk(2).indices.tolist() == [[2, 1]]  # nothing stays pinned


def test_a_pass_that_chooses_otherwise_is_refused():
    pins = Pins()
    with pins.writing():
        torch.topk(torch.rand(2, 5), 2)
    with pins.repeating(), pytest.raises(ModelError, match="another way"):
        torch.topk(torch.rand(2, 5), 3)


@pytest.mark.parametrize("kind", ["mixtral", "phimoe", "deepseek_v3"])
def test_a_model_that_repeats_its_own_choices_computes_the_same(kind):
    model, ids = mixture(kind), windows(2)
    pins = Pins()
    with torch.no_grad():
        with pins.writing():
            free = model(ids, use_cache=False).logits
        with pins.repeating():
            pinned = model(ids, use_cache=False).logits
    assert pins.choices
    assert torch.equal(free, pinned)


def test_the_order_of_experts_is_no_difference():
    one, other = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[3, 0], [1, 3]])
    assert same_choices(one, other).tolist() == [True, False]
