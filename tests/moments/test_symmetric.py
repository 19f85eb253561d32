"""Half products and folded records against whole ones."""

import pytest
import torch

from spectrim.moments.folded import Folded
from spectrim.moments.moments import Moments, OutputMoments
from spectrim.moments.symmetric import ROWS_PER_PRODUCT, SymmetricSum


@pytest.mark.parametrize("size", [1, 7, 384, 385, 900])
def test_panels_hold_the_whole_product(size):
    x = torch.randn(50, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    total = SymmetricSum(size, torch.float64)
    total.add(x[:20])
    total.add(x[20:])
    found = total.whole()
    torch.testing.assert_close(found, x.mT @ x)
    assert torch.equal(found, found.mT)
    assert torch.equal(SymmetricSum.of(found, torch.float64).whole(), found)


def test_fp32_rows_are_summed_in_fp64_part_by_part():
    x = torch.rand(3 * ROWS_PER_PRODUCT, 3, generator=torch.Generator().manual_seed(0))
    total = SymmetricSum(3, torch.float64)
    total.add(x)
    parts = sum((part.mT @ part).double() for part in x.split(ROWS_PER_PRODUCT))
    torch.testing.assert_close(total.whole(), parts, rtol=1e-9, atol=0)


def test_folded_records_come_back_rounded_once():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 500, dtype=torch.float64, generator=generator)
    square = x.mT @ x
    records = Folded()
    records.put("in", Moments(40, square, absolute=x.abs().sum(0)))
    records.put("out", OutputMoments(40, 4, G=square))
    assert torch.equal(records["in"].C, square.float().double())
    assert torch.equal(records["in"].absolute, x.abs().sum(0))
    assert records["out"].windows == 4
    assert list(records.only(["out"])) == ["out"]
