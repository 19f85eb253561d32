"""What a report page is made of, read from a result folder that a stranger may have written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spectrim.errors import ArtifactError
from spectrim.evaluate.curve import CurvePoint
from spectrim.evaluate.distortion import Distortion
from spectrim.evaluate.samples import Sample
from spectrim.storage.json_file import JSON_LIMIT, read_json

__all__ = ["PageContent", "block_and_projection", "read_curve_file", "read_result"]

REPORT_FILE = "spectrim_report.json"
RECIPE_FILE = "recipe.yaml"

_NUMBER = (int, float)
# Where each value of the report lies and what it must be; what may be absent is not listed.
_NEEDED: tuple[tuple[tuple[str, ...], type | tuple[type, ...]], ...] = (
    (("model",), str),
    (("recipe", "name"), str),
    (("recipe", "hash"), str),
    (("keep", "asked"), _NUMBER),
    (("keep", "achieved"), _NUMBER),
    (("keep", "whole_model"), _NUMBER),
    (("keep", "target_bytes", "dense"), int),
    (("keep", "target_bytes", "stored"), int),
    (("keep", "model_bytes", "dense"), int),
    (("keep", "model_bytes", "stored"), int),
    (("rule",), str),
    (("targets",), list),
    (("notes",), list),
    (("seconds",), dict),
    (("environment",), dict),
    (("left_alone",), dict),
)
_TARGET: tuple[tuple[str, type | tuple[type, ...]], ...] = (
    ("name", str),
    ("shape", list),
    ("storage", str),
    ("weights", str),
    ("bytes", int),
    ("kept", _NUMBER),
)


@dataclass(frozen=True)
class PageContent:
    """Everything a page shows; only the first two always exist.

    Attributes:
        report: `spectrim_report.json`.
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
    report = read_json(path)
    for keys, kind in _NEEDED:
        _check(_at(report, keys), kind, ".".join(keys), path)
    for number, target in enumerate(report["targets"]):
        _check(target, dict, f"targets[{number}]", path)
        for key, kind in _TARGET:
            _check(target.get(key), kind, f"targets[{number}].{key}", path)
    recipe = Path(folder) / RECIPE_FILE
    text = ""
    if recipe.is_file():
        text = recipe.read_bytes()[:JSON_LIMIT].decode("utf-8", errors="replace")
    return PageContent(report, text)


def _at(data: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def _check(value: Any, kind: type | tuple[type, ...], name: str, path: Path) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        wanted = " or ".join(k.__name__ for k in kinds)
        raise ArtifactError(
            f"{path}: {name} is {type(value).__name__}, expected {wanted}; the report is damaged "
            "or not from this version"
        )


def read_curve_file(path: str | Path) -> list[CurvePoint]:
    """The points that `spectrim curve` wrote to `curve.json`.

    Raises:
        ArtifactError: no readable curve.
        InputError: a point lacks a value.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "curve.json"
    points = read_json(path).get("points")
    if not isinstance(points, list) or not all(isinstance(p, dict) for p in points):
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


def as_json(data: Any) -> str:
    """JSON for a file: indented, finite numbers only, a line break at the end."""
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
