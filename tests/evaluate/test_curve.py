"""The hull equals a brute-force search over chords; sizes are read as people write them."""

from __future__ import annotations

import csv
import io
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spectrim.errors import InputError
from spectrim.evaluate.points import CurvePoint, curve_csv, lower_hull, parse_keeps

COORDINATE = st.integers(0, 12).map(float)


def best_mixture(points, rate):
    """Least distortion at a rate by a single point or by mixing any two."""
    found = [d for r, d in points if r <= rate]
    for (r1, d1), (r2, d2) in itertools.product(points, points):
        if r1 < rate < r2:
            found.append(d1 + (d2 - d1) * (rate - r1) / (r2 - r1))
    return min(found)


def on_hull(hull, rate):
    for (r1, d1), (r2, d2) in itertools.pairwise(hull):
        if r1 <= rate <= r2:
            return d1 + (d2 - d1) * (rate - r1) / (r2 - r1)
    return hull[-1][1]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=1, max_size=8))
def test_the_hull_is_the_best_mixture_at_every_rate(points):
    hull = lower_hull(points)
    assert set(hull) <= set(points)
    for step in range(25):
        rate = step / 2
        if rate >= hull[0][0]:
            assert on_hull(hull, rate) == pytest.approx(best_mixture(points, rate))


def test_sizes_as_people_write_them():
    assert parse_keeps("0.9..0.3") == [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    assert parse_keeps("0.3..0.5:0.05") == [0.5, 0.45, 0.4, 0.35, 0.3]
    assert parse_keeps("0.4,0.8, 0.6,0.4") == [0.8, 0.6, 0.4]


@pytest.mark.parametrize("text", ["", "a", "0.9..", "1.2", "0..0.5", "0.9..0.3:0", "0.5,-1"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match=r"no sizes|no fraction"):
        parse_keeps(text)


def point(**changes):
    base = dict.fromkeys(CurvePoint.__dataclass_fields__, 0.5) | {"recipe": "svd, plain"}
    base |= dict.fromkeys(("target_bytes", "model_bytes", "peak_bytes"), 7)
    return CurvePoint(**(base | changes))


def test_csv_and_records_give_back_every_value():
    points = [point(), point(recipe="b", peak_bytes=None, excess_low=None)]
    rows = list(csv.DictReader(io.StringIO(curve_csv(points))))
    assert [row["recipe"] for row in rows] == ["svd, plain", "b"]
    assert rows[1]["peak_bytes"] == ""
    assert float(rows[0]["kl"]) == 0.5
    assert CurvePoint.from_record(points[0].record()) == points[0]
    with pytest.raises(InputError, match="lacks 'kl'"):
        CurvePoint.from_record({k: v for k, v in points[0].record().items() if k != "kl"})
