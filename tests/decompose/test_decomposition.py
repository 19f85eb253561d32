"""The record of ordered components and its bookkeeping of errors."""

import pytest
import torch

from spectrim.decompose.decomposition import Decomposition


def record(r, energy, total, **more):
    return Decomposition(
        torch.ones(4, r), torch.ones(r, 5), torch.tensor(energy).double(), total, **more
    )


def test_a_complete_record_sums_the_components_left_out():
    d = record(4, [1.0, 1e-8, 1e-16, 1e-24], 1.0 + 1e-8)
    assert d.error(1) == pytest.approx(1e-8, rel=1e-7)
    assert d.error(3) == pytest.approx(1e-24, rel=1e-12)
    assert d.error(4) == 0
    assert d.relative_error(3) == pytest.approx(1e-24, rel=1e-6)


def test_a_partial_record_infers_what_it_does_not_hold():
    d = record(2, [5.0, 3.0], 10.0, irreducible=0.5)
    assert d.tail == pytest.approx(1.5)
    assert d.error(2) == pytest.approx(2.0)
    assert d.error(0) == pytest.approx(10.0)
    assert d.errors().tolist() == pytest.approx([10.0, 5.0, 2.0])


def test_zero_total_has_zero_relative_error():
    assert record(2, [0.0, 0.0], 0.0).relative_error(1) == 0


@pytest.mark.parametrize("k", [-1, 3])
def test_ranks_that_are_not_held_are_refused(k):
    d = record(2, [1.0, 1.0], 2.0)
    for call in (d.cut, d.error):
        with pytest.raises(ValueError, match="outside"):
            call(k)
