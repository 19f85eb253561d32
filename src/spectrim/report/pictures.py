"""Which figures a page gets: one for everything that there is data for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectrim.report.content import PageContent, block_and_projection
from spectrim.report.drawing import new_figure, svg_text
from spectrim.report.figures import (
    draw_curve,
    draw_depth,
    draw_errors,
    draw_heat_map,
    draw_spectra,
)

__all__ = ["Picture", "pictures_of"]

_SHOWN_SPECTRA = 6
_MOST_PROJECTIONS = 64
"""Kinds of targets that a figure can still tell apart; with more it is left out."""


@dataclass(frozen=True)
class Picture:
    """One figure of the page.

    Attributes:
        name: id on the page.
        title: heading.
        svg: our own markup.
        caption: what to read from it.
    """

    name: str
    title: str
    svg: str
    caption: str


def _picture(
    name: str, title: str, caption: str, draw: Callable[[Any], None], *, height: float = 3.7
) -> Picture:
    with new_figure(height=height) as (figure, axes):
        draw(axes)
        return Picture(
            name, title, svg_text(figure, name=name, label=f"{title}. {caption}"), caption
        )


def pictures_of(content: PageContent) -> list[Picture]:
    """The figures that there is data for."""
    targets = content.report["targets"]
    pictures = _curve_pictures(content)
    kept = {block_and_projection(t["name"]): float(t["kept"]) for t in targets}
    if kept and len({projection for _, projection in kept}) <= _MOST_PROJECTIONS:
        blocks = len({block for block, _ in kept})
        pictures.append(
            _picture(
                "kept",
                "Kept fraction of every target",
                "Share of the dense bytes that remains; darker cells keep more.",
                lambda axes: draw_heat_map(axes, kept),
                height=min(9.0, 1.6 + 0.3 * blocks),
            )
        )
    errors = _errors(targets)
    if 0 < len(errors) <= _MOST_PROJECTIONS:
        pictures.append(
            _picture(
                "errors",
                "Predicted and measured error",
                "Relative squared error of each target on its calibration inputs: predicted in "
                "the recipe's own objective, measured of the layer's plain output. On the dotted "
                "line both agree; an objective with weights of its own promises another number.",
                lambda axes: draw_errors(axes, errors),
            )
        )
    return pictures + _depth_pictures(content) + _spectra_pictures(content)


def _curve_pictures(content: PageContent) -> list[Picture]:
    if not content.curve:
        return []
    caption = (
        "Bars are 95 % intervals. The wide line is the lower convex hull of all points: an "
        "empirical upper bound on the distortion-rate function of the model."
    )
    return [
        _picture(
            f"curve-{measure}",
            title,
            caption,
            lambda axes, measure=measure: draw_curve(axes, content.curve, measure=measure),
        )
        for measure, title in (
            ("excess", "Loss above dense against size"),
            ("kl", "Divergence from dense against size"),
        )
    ]


def _errors(targets: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for t in targets:
        pair = t.get("predicted_error"), t.get("measured_error")
        if all(isinstance(v, int | float) and v > 0 for v in pair):
            _, projection = block_and_projection(t["name"])
            found.setdefault(projection, []).append((float(pair[0]), float(pair[1])))  # type: ignore[arg-type]
    return found


def _depth_pictures(content: PageContent) -> list[Picture]:
    if not content.depth:
        return []
    caption = (
        "Distance of each block's output from the original's, errors of earlier blocks included."
    )
    return [
        _picture(
            f"depth-{measure}",
            f"{title} along depth",
            caption,
            lambda axes, measure=measure: draw_depth(axes, content.depth, measure=measure),
        )
        for measure, title in (("mse", "Squared error"), ("cosine", "Cosine distance"))
    ]


def _spectra_pictures(content: PageContent) -> list[Picture]:
    if not content.spectra:
        return []
    names = list(content.spectra)
    step = max(1, math.ceil(len(names) / _SHOWN_SPECTRA))
    shown = {name: content.spectra[name] for name in names[::step]}
    cuts = {t["name"]: t.get("rank") for t in content.report["targets"]}
    return [
        _picture(
            "spectra",
            "Spectra",
            f"Error that remains after the leading components, {len(shown)} of {len(names)} "
            "targets; a marker shows where the target was cut.",
            lambda axes: draw_spectra(axes, shown, cuts),
        )
    ]
