import pytest
import torch

from spectrim.allocate import Curve, Shape, loss_by_rank
from spectrim.allocate.curve import tail_energy
from spectrim.errors import InputError, NonFiniteError

ENERGY = torch.tensor([5.0, 3.0, 2.0], dtype=torch.float64)
SCORE = torch.tensor([4.0, -1.0, 3.0], dtype=torch.float64)


def curve(**changes):
    fields = {"energy": ENERGY, "total": 12.0, "irreducible": 2.0, **changes}
    return Curve("a", 0, "q", Shape(3, 5), **fields)


def test_energy_is_the_relative_tail():
    assert tail_energy(curve()).tolist() == [12, 7, 4, 2]
    assert loss_by_rank(curve(), "energy") == pytest.approx([1, 7 / 12, 4 / 12, 2 / 12])
    assert loss_by_rank(curve(), "kfac").tolist() == [12, 7, 4, 2]


def test_tail_is_never_below_what_no_rank_removes():
    assert tail_energy(curve(total=10.0))[-1] == 2


def test_a_zero_matrix_has_no_loss():
    zero = curve(energy=torch.zeros(3), total=0.0, irreducible=0.0)
    assert loss_by_rank(zero, "energy").tolist() == [0, 0, 0, 0]


def test_first_order_does_not_profit_from_cancellation():
    # drops from the tail: 3, then 3 - 1 = 2, then 6
    assert loss_by_rank(curve(score=SCORE), "first_order").tolist() == [6, 3, 3, 0]


def test_second_order_prefers_a_given_loss():
    loss = torch.tensor([4.0, 3.0, 1.0, 0.0])
    assert loss_by_rank(curve(loss=loss), "second_order").tolist() == [4, 3, 1, 0]
    assert loss_by_rank(curve(), "second_order").tolist() == [12, 7, 4, 2]


def test_measured_meets_its_reference():
    losses = loss_by_rank(curve(reference=(2, 0.5)), "measured")
    assert losses[2] == pytest.approx(0.5)
    assert losses == pytest.approx([1.5, 0.875, 0.5, 0.25])


@pytest.mark.parametrize(
    "changes, score, text",
    [
        ({"energy": None}, "energy", "no energy"),
        ({}, "first_order", "no score"),
        ({}, "measured", "no measured KL"),
        ({"reference": (7, 0.1)}, "measured", "outside 0..3"),
        ({"score": torch.zeros(2)}, "first_order", "expected"),
        ({}, "unknown", "unknown score"),
    ],
)
def test_what_is_missing_is_named(changes, score, text):
    with pytest.raises(InputError, match=text):
        loss_by_rank(curve(**changes), score)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(NonFiniteError, match="energy"):
        loss_by_rank(curve(energy=torch.tensor([1.0, float("nan"), 0.0])), "energy")
