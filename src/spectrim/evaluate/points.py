"""Points of a rate-distortion curve, their lower convex hull, and their table.

Rate is bits per original weight of the target layers, distortion is nats per token above the dense
model. Every point is a code that exists, so the true distortion-rate function lies on or below all
of them; since any two codes can be mixed in proportion over many models, it also lies on or below
the chords. The lower convex hull is therefore an empirical upper bound on it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from spectrim.errors import ArtifactError, InputError
from spectrim.tolerances import STEP_COUNT

_DENSE = "dense "


@dataclass(frozen=True)
class CurvePoint:
    """One size of one recipe, measured.

    Attributes:
        recipe: name of the recipe, or of the elastic artifact.
        keep: asked for.
        achieved: reached.
        target_bytes: of all targets, as stored.
        model_bytes: of the whole checkpoint.
        bits_per_weight: stored bits per original target weight.
        nll: nats per token.
        perplexity: `exp(nll)`.
        excess: nats per token above the dense model.
        excess_low: lower end of its 95 % interval (paired bootstrap); None for a single window.
        excess_high: upper end.
        kl: `KL(dense || compressed)`, nats per token.
        kl_error: its standard error.
        top1: share of positions where both models prefer the same token.
        seconds: to compress.
        peak_bytes: largest resident memory of the process, where it ran alone; else None.
    """

    recipe: str
    keep: float
    achieved: float
    target_bytes: int
    model_bytes: int
    bits_per_weight: float
    nll: float
    perplexity: float
    excess: float
    excess_low: float | None
    excess_high: float | None
    kl: float
    kl_error: float | None
    top1: float
    seconds: float
    peak_bytes: int | None = None

    def record(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> CurvePoint:
        """The point that `record` wrote.

        Raises:
            ArtifactError: a field is missing or of another kind; names it.
        """
        names = [f.name for f in fields(cls)]
        missing = [name for name in names if name not in record]
        if missing:
            raise ArtifactError(f"a point of the curve lacks {missing[0]!r}; measure it again")
        try:
            return cls(**dict(_point_record().model_validate(record)))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ArtifactError(
                f"a point of the curve is damaged: {first['loc'][0]}: {first['msg']}; "
                "measure it again"
            ) from error


@cache
def _point_record() -> type[BaseModel]:
    """The fields of a point with strict types and finite numbers."""
    hints: dict[str, Any] = {name: (hint, ...) for name, hint in get_type_hints(CurvePoint).items()}
    strict = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    return create_model("PointRecord", __config__=strict, **hints)


def dense_name(weights: str) -> str:
    """What the points of the dense model in a number format are called: `dense int8`."""
    return _DENSE + weights


def is_dense_format(point: CurvePoint) -> bool:
    """Whether the point is the dense model in another number format, which no recipe made."""
    return point.recipe.startswith(_DENSE)


def lower_hull(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The falling part of the lower convex hull of (rate, distortion) points, by rate.

    A larger rate never needs more distortion, so the hull ends at the smallest distortion.
    """
    hull: list[tuple[float, float]] = []
    for point in sorted(points):
        if hull and hull[-1][1] <= point[1]:
            continue  # another point has no larger rate and no larger distortion
        while len(hull) > 1 and _not_below(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _not_below(
    first: tuple[float, float], middle: tuple[float, float], last: tuple[float, float]
) -> bool:
    """Whether the middle point lies on or above the chord of the outer two."""
    run, rise = last[0] - first[0], last[1] - first[1]
    return (middle[1] - first[1]) * run >= rise * (middle[0] - first[0])


def curve_csv(points: Sequence[CurvePoint]) -> str:
    """The points as CSV with a header; unknown values are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(CurvePoint)], lineterminator="\n")
    writer.writeheader()
    for point in points:
        writer.writerow(point.record())
    return out.getvalue()


def parse_keeps(text: str) -> list[float]:
    """Sizes from `0.9,0.6,0.3`, or in steps of 0.1 from `0.9..0.3`, or `0.9..0.3:0.05`.

    Raises:
        InputError: not numbers in (0, 1], or a step that leads nowhere.
    """
    try:
        if ".." in text:
            ends, _, step = text.partition(":")
            first, last = (float(part) for part in ends.split(".."))
            keeps = _stepped(first, last, float(step or 0.1))
        else:
            keeps = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"{text!r} are no sizes ({error}); write 0.9,0.6,0.3 or 0.9..0.3 or 0.9..0.3:0.05"
        ) from error
    wrong = [keep for keep in keeps if not 0 < keep <= 1]
    if wrong:
        raise InputError(f"keep {wrong[0]:g} in {text!r} is no fraction in (0, 1]")
    return sorted(set(keeps), reverse=True)


def _stepped(first: float, last: float, step: float) -> list[float]:
    if not 0 < step <= 1:
        raise ValueError(f"a step of {step:g} is not in (0, 1]")
    if not all(0 < end <= 1 for end in (first, last)):
        raise ValueError(f"{first:g} and {last:g} must lie in (0, 1]")
    high, low = max(first, last), min(first, last)
    count = int((high - low) / step * (1 + STEP_COUNT))
    # Rounded so that 0.9 - 3 x 0.1 is 0.6 and finds the cache of 0.6.
    return [round(high - i * step, 9) for i in range(count + 1)]
