"""Which forms a plan may choose."""

import pytest

from spectrim.allocate.budget import Shape
from spectrim.allocate.curve import Curve
from spectrim.allocate.forms import (
    AUTO,
    EVERY,
    RESIDUAL,
    Form,
    dense_forms,
    low_rank_forms,
    whole_forms,
)
from spectrim.allocate.ladder import Limits
from spectrim.allocate.yardstick import judged_forms


@pytest.mark.parametrize(
    ("patterns", "there"), [(EVERY, False), (("*", "fp8"), True), (("fp*",), True)]
)
def test_fp8_is_taken_where_it_is_named_and_not_by_itself(patterns, there):
    assert (Form("dense", "fp8") in dense_forms(AUTO, patterns)) == there
    assert (Form("factored", "fp8") in low_rank_forms(AUTO, AUTO, patterns)) == there
    assert Form("dense", "fp8") in dense_forms("fp8")


def test_a_pattern_leaves_out_what_does_not_fit():
    found = {
        form.weights
        for form in (*dense_forms(AUTO, ("int4-*",)), *low_rank_forms(AUTO, AUTO, ("int4-*",)))
    }
    assert "native" in found
    assert all(name == "native" or name.startswith("int4-") for name in found)


def test_residuals_are_offered_where_the_plan_chooses_formats_but_with_dense():
    assert not any(form.storage == RESIDUAL for form in whole_forms("dense", AUTO))
    assert not any(form.storage == RESIDUAL for form in whole_forms(AUTO, "int8"))
    for storage in ("packed", "factored", AUTO, RESIDUAL):
        found = {form for form in whole_forms(storage, AUTO) if form.storage == RESIDUAL}
        assert {form.base for form in found} == {"int4-g64", "int4-g128", "int3-g128", "int2-g128"}
        assert set(dense_forms(AUTO)) == {*whole_forms(storage, AUTO)} - found
    assert low_rank_forms(RESIDUAL, AUTO) == ()
    some = whole_forms(RESIDUAL, AUTO, ("int4-*", "int8"))
    assert {form.base for form in some if form.storage == RESIDUAL} == {"int4-g64", "int4-g128"}
    assert not any(form.storage == RESIDUAL for form in whole_forms(RESIDUAL, AUTO, ("int4-*",)))


def test_a_named_residual_competes_with_its_base_and_native_numbers():
    found = whole_forms(RESIDUAL, "int3-g64+int8")
    assert found == (Form("dense"), Form("dense", "int3-g64"), Form(RESIDUAL, "int3-g64+int8"))
    residual = found[-1]
    assert residual.whole
    assert residual.low_rank
    assert residual.ranks(20) == (2, 4, 8, 16)


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_what_a_plan_may_choose_is_judged_and_so_is_the_honest_line(storage):
    curves = [Curve("t", 0, "t", Shape(256, 256, False))]
    limits = Limits(dtype_bytes=2, storage=storage, weights="int4-g64")
    judged = judged_forms(limits, curves, keep=0.3)
    assert Form("dense", "int4-g64") in judged
    assert Form("dense", "int4-g128") in judged
    assert not any(form.low_rank for form in judged)
    native = judged_forms(Limits(dtype_bytes=2, storage=storage), curves, keep=0.3)
    assert native == (Form("dense", "int4-g128"),)
