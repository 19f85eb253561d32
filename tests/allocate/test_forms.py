"""Which forms a plan may choose."""

import pytest

from spectrim.allocate.forms import AUTO, EVERY, Form, dense_forms, low_rank_forms


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
