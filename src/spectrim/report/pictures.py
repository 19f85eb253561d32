"""Which figures a page gets: one for everything that there is data for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectrim.layers.layout import LAYERS
from spectrim.report.content import PageContent, block_and_projection
from spectrim.report.drawing import PAGE_WIDTH, new_figure, svg_text
from spectrim.report.figures import (
    draw_curve,
    draw_depth,
    draw_errors,
    draw_heat_map,
    draw_spectra,
)

_SHOWN_SPECTRA = 6
_MOST_PROJECTIONS = 64
"""Kinds of targets that a figure can still tell apart; with more it is left out."""


@dataclass(frozen=True)
class Picture:
    """One figure of the page.

    Attributes:
        part: `trade-off` or `layers`.
        name: id on the page.
        title: heading.
        svg: our own markup.
        caption: what to read from it.
    """

    part: str
    name: str
    title: str
    svg: str
    caption: str


def _picture(
    name: str, title: str, caption: str, draw: Callable[[Any], None], *, height: float = 3.5
) -> Picture:
    with new_figure(width=PAGE_WIDTH, height=height) as (figure, axes):
        draw(axes)
        part = "trade-off" if name.startswith("curve") else "layers"
        svg = svg_text(figure, name=name, label=f"{title}. {caption}")
        return Picture(part, name, title, svg, caption)


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
                "What every layer keeps",
                "Share of each layer's bytes that remains; darker cells keep more.",
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
                "How far each layer's output is off on the text it was fitted to (0 is exact, 1 is "
                "all of it): as the recipe predicted, and as measured. On the dotted line both "
                "agree; a recipe that weighs outputs predicts another number.",
                lambda axes: draw_errors(axes, errors),
            )
        )
    return pictures + _depth_pictures(content) + _spectra_pictures(content)


def _curve_pictures(content: PageContent) -> list[Picture]:
    if not content.curve:
        return []
    caption = (
        "Lower left is better. Bars are 95 % intervals. Nothing that was measured lies in the "
        "gray area; mixing two sizes reaches every point of its edge, the lower convex hull."
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


def _is_cut(target: Mapping[str, Any]) -> bool:
    """Whether its rank says how many components were kept."""
    layout = LAYERS.get(target.get("storage", ""))
    return layout is None or not layout.whole


def _spectra_pictures(content: PageContent) -> list[Picture]:
    if not content.spectra:
        return []
    names = list(content.spectra)
    step = max(1, math.ceil(len(names) / _SHOWN_SPECTRA))
    shown = {name: content.spectra[name] for name in names[::step]}
    cuts = {t["name"]: t.get("rank") for t in content.report["targets"] if _is_cut(t)}
    return [
        _picture(
            "spectra",
            "Spectra",
            f"Error that remains after the leading components, {len(shown)} of {len(names)} "
            "targets; a marker shows where the target was cut.",
            lambda axes: draw_spectra(axes, shown, cuts),
        )
    ]
