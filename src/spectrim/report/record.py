"""What `spectrim_report.json` must say before a page is made of it.

Only what a page shows is kept; everything else in the file is passed over. Types are strict, so
that a number written as text is refused here and not met by the code that draws.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from spectrim.storage.strict import LARGEST_SIDE, MOST_TARGETS, Finite, Name

FORMAT_VERSION = 1

Line = Annotated[str, StringConstraints(max_length=1000)]
Note = Annotated[str, StringConstraints(max_length=10_000)]
Bytes = Annotated[int, Field(ge=0, lt=2**63)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Shown(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class RecipeRecord(_Shown):
    """Which recipe was run."""

    name: Line
    hash: Line


class Pair(_Shown):
    """Bytes before and after."""

    dense: Bytes
    stored: Bytes


class KeepRecord(_Shown):
    """Sizes asked for and reached."""

    asked: Share
    achieved: Share
    whole_model: Share
    target_bytes: Pair
    model_bytes: Pair


class TargetRecord(_Shown):
    """One row of the table of targets."""

    name: Name
    shape: Annotated[
        list[Annotated[int, Field(ge=1, le=LARGEST_SIDE)]], Field(min_length=2, max_length=2)
    ]
    rank: Annotated[int, Field(ge=1, le=LARGEST_SIDE)] | None = None
    storage: Line
    weights: Line
    bytes: Bytes
    kept: Share
    predicted_error: Finite | None = None
    measured_error: Finite | None = None
    damping: Finite | None = None


class PerplexityRecord(_Shown):
    """One model on one text."""

    perplexity: Share
    nll: Finite
    standard_error: Finite | None = None


class DifferenceRecord(_Shown):
    """Compressed minus dense on the same windows."""

    nll: Finite
    nll_standard_error: Finite


class MeasuredText(_Shown):
    """Both models on one text."""

    text: Line
    kind: Line
    what: Line
    windows: Annotated[int, Field(ge=1)]
    window_length: Annotated[int, Field(ge=1)]
    dense: PerplexityRecord
    compressed: PerplexityRecord
    difference: DifferenceRecord | None = None
    routing: Share | None = None


class MeasuredRecord(_Shown):
    """Quality before and after, as the run itself measured it."""

    texts: Annotated[list[MeasuredText], Field(max_length=1000)]
    why_not: Line | None = None


class OutsideRecord(_Shown):
    """How many parameters no budget counts."""

    words: Note
    parameters: Annotated[dict[Line, Bytes], Field(max_length=2)]
    in_blocks: Annotated[dict[Line, Bytes], Field(max_length=1000)]
    elsewhere: Annotated[dict[Line, Bytes], Field(max_length=1000)]


class LeftAlone(_Shown):
    """What was not compressed; the reports of surveys' artifacts do not say it."""

    left_alone: Annotated[dict[Line, Note], Field(max_length=MOST_TARGETS)] = {}
    outside_budget: OutsideRecord | None = None


class ReportRecord(LeftAlone):
    """The whole report, as far as a page shows it."""

    format_version: Annotated[int, Field(ge=1)] = FORMAT_VERSION
    model: Line
    recipe: RecipeRecord
    keep: KeepRecord
    rule: Line
    predicted_loss: Finite | None = None
    predicted_loss_unit: Line | None = None
    measured: MeasuredRecord | None = None
    targets: Annotated[list[TargetRecord], Field(max_length=MOST_TARGETS)]
    notes: Annotated[list[Note], Field(max_length=10_000)]
    seconds: Annotated[dict[Line, Finite], Field(max_length=1000)]
    environment: Annotated[dict[Line, Any], Field(max_length=1000)]
    calibration: Annotated[dict[Line, Any], Field(max_length=1000)] | None = None
    peak_memory_bytes: Bytes | None = None
