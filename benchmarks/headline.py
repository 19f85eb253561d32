"""The picture of the README: every recipe on the rate-distortion plane, from committed results.

    python benchmarks/headline.py

Nothing is measured here: the rows of the studies in `benchmarks/results` that share the protocol of
`protocol.py` (seed 0, 781 windows) are drawn against what they store. Bits are of the kept fraction
of a bf16 weight; factors of `acip` and `soco` are fp32 in these rows and drawn as what their
numbers would take in bf16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from protocol import EVALUATION, read_results

from spectrim.evaluate.points import CurvePoint
from spectrim.report.drawing import new_figure, save_figure
from spectrim.report.figures import draw_curve

RESULTS = Path(__file__).parent / "results"
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "rate_distortion.png"
BITS = 16

SERIES = {
    "svd": ("layerwise", "svd"),
    "asvd": ("layerwise", "asvd"),
    "svd-llm": ("layerwise", "svd-llm"),
    "aa-svd": ("layerwise", "objective 4 refined"),
    "zs-svd": ("global_allocation", "zs-svd 5 corrections"),
    "soco": ("learned", "soco"),
    "acip": ("learned", "acip"),
    "spectrim": ("recipe_study", "spectrim"),
    "spectrim balanced": ("recipe_study", "spectrim-balanced"),
    "spectrim thorough": ("recipe_study", "spectrim-thorough"),
    "spectrim int8": ("recipe_study", "int8"),
    "spectrim int4": ("recipe_study", "int4"),
    "dense int8": ("recipe_study", "dense int8"),
    "dense int4": ("recipe_study", "dense int4"),
}
"""Name in the picture -> study and row."""


def points() -> list[CurvePoint]:
    """Every measured point that is drawn, series by series."""
    return [point for name, (study, row) in SERIES.items() for point in _series(name, study, row)]


def _series(name: str, study: str, wanted: str) -> Iterator[CurvePoint]:
    rows = [r for r in read_results(RESULTS / f"{study}.json") if r["eval_windows"] == EVALUATION]
    dense = next(r["nll"] for r in rows if r["row"] == "dense")
    chosen = [r for r in rows if r["row"] == wanted and not r.get("seed", 0)]
    for row in sorted(chosen, key=lambda r: -r["keep"]):
        yield _point(name, row, row["nll"] - dense)


def _point(name: str, row: dict[str, Any], excess: float) -> CurvePoint:
    return CurvePoint(
        recipe=name,
        keep=row["keep"],
        achieved=row["kept"],
        target_bytes=0,
        model_bytes=0,
        bits_per_weight=BITS * row["kept"],
        nll=row["nll"],
        perplexity=row["perplexity"],
        excess=excess,
        excess_low=None,
        excess_high=None,
        kl=math.nan,
        kl_error=None,
        top1=math.nan,
        seconds=row.get("cpu_seconds", 0.0),
    )


def main() -> None:
    """Draw it."""
    with new_figure(width=7.6, height=5.0) as (figure, axes):
        draw_curve(axes, points())
        save_figure(figure, PICTURE, kind=PICTURE.suffix[1:])
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
