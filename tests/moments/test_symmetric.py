"""Half products and folded records against whole ones."""

import contextlib

import pytest
import torch

from spectrim.devices import HOST, in_tf32
from spectrim.moments import symmetric
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


@pytest.mark.parametrize(
    ("dtype", "sampled", "rounds"),
    [
        (torch.bfloat16, False, True),
        (torch.float16, False, True),
        (torch.float32, False, False),
        (torch.float32, True, True),
    ],
)
def test_only_what_tf32_holds_or_what_is_an_estimate_is_multiplied_in_it(
    dtype, sampled, rounds, monkeypatch
):
    asked = []

    @contextlib.contextmanager
    def noted(device, wanted):
        asked.append(wanted)
        yield

    monkeypatch.setattr(symmetric, "in_tf32", noted)
    SymmetricSum(3, torch.float64).add(torch.ones(5, 3, dtype=dtype), sampled=sampled)
    assert asked == [rounds]


def test_tf32_ends_with_its_context_and_hosts_have_none():
    card, settings = torch.device("cuda", 0), torch.backends.cuda.matmul
    before = settings.allow_tf32
    with contextlib.suppress(RuntimeError), in_tf32(card):
        with in_tf32(HOST), in_tf32(card, wanted=False):
            assert settings.fp32_precision == "tf32"
        raise RuntimeError
    assert settings.allow_tf32 == before


def test_sums_in_the_dtype_of_their_rows_and_wider_ones_agree():
    x = torch.randn(100, 400, generator=torch.Generator().manual_seed(0))
    narrow, wide = SymmetricSum(400, torch.float32), SymmetricSum(400, torch.float64)
    for part in x.split(30):
        narrow.add(part)
        wide.add(part)
    expected = wide.whole()
    # Of the smallest diagonal entry: what is off it is a sum of both signs.
    least = 5e-7 * float(expected.diagonal().min())
    torch.testing.assert_close(narrow.whole(), expected, rtol=1e-5, atol=least)
