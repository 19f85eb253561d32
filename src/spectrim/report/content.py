"""What a report page is made of, read from a result folder that a stranger may have written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectrim.errors import ArtifactError
from spectrim.evaluate.distortion import Distortion
from spectrim.evaluate.points import CurvePoint
from spectrim.evaluate.samples import Sample
from spectrim.report.record import FORMAT_VERSION, ReportRecord
from spectrim.storage.json_file import read_json, read_record
from spectrim.storage.strict import check_version

REPORT_FILE = "spectrim_report.json"
RECIPE_FILE = "recipe.yaml"
RECIPE_LIMIT = 2**20
"""Bytes of a recipe that are shown."""

MOST_POINTS = 10_000
"""Points of one curve file."""


@dataclass(frozen=True)
class PageContent:
    """Everything a page shows; only the first two always exist.

    Attributes:
        report: what a page shows of `spectrim_report.json`.
        recipe_yaml: the resolved recipe.
        curve: points of the rate-distortion curve.
        spectra: target -> energies of its ordered components.
        depth: distortion of one or several models along depth.
        evaluations: records of `spectrim evaluate`, dense first.
        samples: continuations of prompts, prompts outermost.
    """

    report: Mapping[str, Any]
    recipe_yaml: str = ""
    curve: Sequence[CurvePoint] = ()
    spectra: Mapping[str, Sequence[float]] = field(default_factory=dict)
    depth: Sequence[Distortion] = ()
    evaluations: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Sample] = ()


def read_result(folder: str | Path) -> PageContent:
    """Report and recipe of a result folder.

    Raises:
        ArtifactError: a file or a value is missing or of another kind; names it.
    """
    path = Path(folder) / REPORT_FILE
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is no result of `spectrim compress`: it has no {REPORT_FILE} (points of "
            "`spectrim curve` join a result's page with --curve)"
        )
    report = read_record(path, ReportRecord, FORMAT_VERSION, absent=1).model_dump()
    recipe = Path(folder) / RECIPE_FILE
    text = ""
    if recipe.is_file():
        with recipe.open("rb") as file:
            text = file.read(RECIPE_LIMIT).decode("utf-8", errors="replace")
    return PageContent(report, text)


def read_curve_file(path: str | Path) -> list[CurvePoint]:
    """The points that `spectrim curve` wrote to `curve.json`.

    Raises:
        ArtifactError: no readable curve, or a point without a value or with one of another kind.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "curve.json"
    data = read_json(path)
    check_version(data, FORMAT_VERSION, absent=1, source=path)
    points = data.get("points")
    if (
        not isinstance(points, list)
        or len(points) > MOST_POINTS
        or not all(isinstance(p, dict) for p in points)
    ):
        raise ArtifactError(f"{path} has no list of points; give what `spectrim curve` wrote")
    return [CurvePoint.from_record(point) for point in points]


def block_and_projection(name: str) -> tuple[int, str]:
    """`model.layers.3.self_attn.q_proj` -> (3, `self_attn.q_proj`).

    The first number names the block; a name without one counts as block 0.
    """
    parts = name.split(".")
    for position, part in enumerate(parts[:-1]):
        if part.isdigit() and len(part) < 9:
            return int(part), ".".join(parts[position + 1 :])
    return 0, name
