"""The figures: rate-distortion curve, kept fractions, spectra, errors, distortion along depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from spectrim.evaluate.distortion import BLOCK, Distortion
from spectrim.evaluate.points import CurvePoint, is_dense_format, lower_hull
from spectrim.report.drawing import INK, legend_above, logarithmic, series_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEAST_SHOWN = 1e-5
"""Share of a spectrum below which it is not drawn."""

_FORMAT_MARKERS = ("*", "P")

_MOST_WRITTEN = 9
"""Columns of the heat map whose cells are wide enough for a number."""

_CHORD_STEPS = 40
_BELOW = 3.0
"""Points without a measurable loss are drawn this factor below the least loss there is."""

_LOG_SPAN = 20.0
"""Axes become logarithmic when the largest value exceeds the smallest by this factor."""


def group_by_recipe(points: Sequence[CurvePoint]) -> dict[str, list[CurvePoint]]:
    """Points of each recipe, by rising rate; recipes in order of appearance."""
    groups: dict[str, list[CurvePoint]] = {}
    for point in points:
        groups.setdefault(point.recipe, []).append(point)
    return {name: sorted(g, key=lambda p: p.bits_per_weight) for name, g in groups.items()}


def draw_curve(axes: Axes, points: Sequence[CurvePoint], *, measure: str = "excess") -> None:
    """Distortion against rate, one line per recipe, with the lower convex hull.

    The dense model in other number formats is drawn as single marks in ink.

    Args:
        axes: to draw on.
        points: measured.
        measure: `excess` (nats per token above dense, with its interval) or `kl`.
    """
    values = [getattr(p, measure) for p in points]
    positive = [value for value in values if value > 0]
    log = bool(positive) and max(positive) > _LOG_SPAN * min(positive)
    floor = min(positive) / _BELOW if log else min(values)
    groups = group_by_recipe([p for p in points if not is_dense_format(p)])
    for (name, group), style in zip(groups.items(), series_styles(len(groups)), strict=True):
        line = _chords([(p.bits_per_weight, max(getattr(p, measure), floor)) for p in group])
        # Mixing two sizes reaches every point of their chord, here as for the hull.
        axes.plot(*zip(*line, strict=True), label=name, markevery=_CHORD_STEPS, **style)
        _draw_intervals(axes, group, measure, style["color"])
    formats = group_by_recipe([p for p in points if is_dense_format(p)])
    for (name, group), marker in zip(formats.items(), _FORMAT_MARKERS, strict=False):
        x = [p.bits_per_weight for p in group]
        y = [max(getattr(p, measure), floor) for p in group]
        axes.plot(x, y, color=INK, linestyle="none", marker=marker, markersize=9, label=name)
        _draw_intervals(axes, group, measure, INK)
    hull = _chords(lower_hull((p.bits_per_weight, max(getattr(p, measure), floor)) for p in points))
    if log:
        logarithmic(axes.yaxis)
        axes.set_ylim(bottom=floor / 1.3)
    _draw_hull(axes, hull)
    none = log and len(positive) < len(values)
    lost = "\n(on the lower edge: no loss could be measured)" if none else ""
    axes.set_xlabel(f"rate: bits per original target weight{lost}")
    axes.set_ylabel(
        "nats per token above dense" if measure == "excess" else "KL to dense, nats per token"
    )
    legend_above(axes)


def _draw_hull(axes: Axes, hull: Sequence[tuple[float, float]]) -> None:
    """The area under the hull: nothing measured lies in it, and its edge covers no point."""
    bottom, top = axes.get_ylim()
    x, y = zip(*hull, strict=True)
    axes.plot(x, y, color=INK, linewidth=0.6, alpha=0.4, zorder=1, label="lower convex hull")
    axes.fill_between(x, y, bottom, color=INK, alpha=0.07, linewidth=0, zorder=0.5)
    axes.set_ylim(bottom, top)


def _chords(hull: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points along the hull: its chords are straight in nats and curves on a logarithmic axis."""
    found = list(hull[:1])
    for (r1, d1), (r2, d2) in pairwise(hull):
        shares = [step / _CHORD_STEPS for step in range(1, _CHORD_STEPS + 1)]
        found += [(r1 + s * (r2 - r1), d1 + s * (d2 - d1)) for s in shares]
    return found


def _draw_intervals(axes: Axes, group: Sequence[CurvePoint], measure: str, color: str) -> None:
    for point in group:
        interval = _interval(point, measure)
        if interval is not None:
            rate = [point.bits_per_weight] * 2
            axes.plot(rate, interval, color=color, linewidth=1, marker="_")


def _interval(point: CurvePoint, measure: str) -> tuple[float, float] | None:
    if measure == "excess":
        if point.excess_low is None or point.excess_high is None:
            return None
        return point.excess_low, point.excess_high
    if point.kl_error is None:
        return None
    return point.kl - 1.96 * point.kl_error, point.kl + 1.96 * point.kl_error


def draw_heat_map(axes: Axes, kept: Mapping[tuple[int, str], float]) -> None:
    """Kept fraction of every target, blocks down and projections across; darker keeps more.

    Args:
        axes: to draw on.
        kept: (block, projection) -> fraction of its bytes.
    """
    import numpy as np

    blocks = sorted({block for block, _ in kept})
    projections = list(dict.fromkeys(projection for _, projection in kept))
    table = np.full((len(blocks), len(projections)), math.nan)
    for (block, projection), value in kept.items():
        table[blocks.index(block), projections.index(projection)] = value
    columns, rows = (np.arange(size + 1) - 0.5 for size in (len(projections), len(blocks)))
    # A mesh stays vectors, where an image would embed a bitmap.
    axes.pcolormesh(columns, rows, np.ma.masked_invalid(table), cmap="Blues", vmin=0, vmax=1.15)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xticks(range(len(projections)), [_short(p) for p in projections], rotation=30)
    for label in axes.get_xticklabels():
        label.set_horizontalalignment("right")
        label.set_rotation_mode("anchor")
    step = max(1, len(blocks) // 24)
    axes.set_yticks(range(0, len(blocks), step), [str(b) for b in blocks[::step]])
    axes.set_ylabel("block")
    if len(blocks) <= 40 and len(projections) <= _MOST_WRITTEN:
        for row in range(len(blocks)):
            for column in range(len(projections)):
                value = table[row, column]
                if not math.isnan(value):
                    # The cell's own color decides, not the page's, so neither ink is currentColor.
                    color = "#ffffff" if value > 0.75 else "#111111"
                    words = f"{value:.0%}"
                    axes.text(column, row, words, ha="center", va="center", color=color, fontsize=9)


def draw_spectra(
    axes: Axes, spectra: Mapping[str, Sequence[float]], cuts: Mapping[str, int | None]
):
    """Relative error that remains after k components, with a mark where each target was cut.

    Args:
        axes: to draw on.
        spectra: name -> energies of the ordered components.
        cuts: name -> rank, None where the target stayed dense.
    """
    for (name, energies), style in zip(spectra.items(), series_styles(len(spectra)), strict=True):
        remaining = _remaining(energies)
        x = [k / len(energies) for k in range(len(remaining))]
        plain = {key: style[key] for key in ("linestyle", "color")}
        axes.plot(x, remaining, label=_short(name, 3), **plain)
        rank = cuts.get(name)
        if rank is not None and rank < len(remaining):
            marks = {key: style[key] for key in ("marker", "color", "markerfacecolor")}
            axes.plot([x[rank]], [remaining[rank]], linestyle="none", **marks)
    logarithmic(axes.yaxis)
    axes.set_xlabel("share of components kept")
    axes.set_ylabel("relative error that remains")
    legend_above(axes, most=2)


def _remaining(energies: Sequence[float]) -> list[float]:
    """Energy after k components over all energy, for k = 0 to the last that leaves something."""
    total = math.fsum(energies)
    tail, result = total, []
    for energy in energies:
        result.append(tail / total if total > 0 else math.nan)
        tail -= energy
    # The last components are nothing but rounding, and would stretch the axis over them.
    return [value for value in result if not value < _LEAST_SHOWN]


def draw_errors(axes: Axes, errors: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Measured against predicted relative error of every target, one marker per projection.

    Args:
        axes: to draw on.
        errors: projection -> (predicted, measured) of its targets; zeros are left out.
    """
    shown = {name: [(p, m) for p, m in pairs if p > 0 and m > 0] for name, pairs in errors.items()}
    shown = {name: pairs for name, pairs in shown.items() if pairs}
    for (name, pairs), style in zip(shown.items(), series_styles(len(shown)), strict=True):
        marks = {key: style[key] for key in ("marker", "color", "markerfacecolor")}
        axes.plot(
            [p for p, _ in pairs],
            [m for _, m in pairs],
            linestyle="none",
            label=_short(name),
            **marks,
        )
    values = [value for pairs in shown.values() for pair in pairs for value in pair]
    if values:
        ends = [min(values), max(values)]
        axes.plot(ends, ends, color=INK, linewidth=1, linestyle=":", label="as predicted")
    logarithmic(axes.xaxis)
    logarithmic(axes.yaxis)
    axes.set_xlabel("predicted relative error")
    axes.set_ylabel("measured relative error")
    legend_above(axes)


def draw_depth(axes: Axes, found: Sequence[Distortion], *, measure: str) -> None:
    """One measure of the block outputs along depth, one line per model.

    Args:
        axes: to draw on.
        found: of one or several models; projections are left out.
        measure: `mse`, `relative` or `cosine`.
    """
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, list[tuple[int, float]]] = {}
    for one in found:
        if one.projection == BLOCK:
            lines.setdefault(one.model, []).append((one.block, getattr(one, measure)))
    for (name, line), style in zip(lines.items(), series_styles(len(lines)), strict=True):
        axes.plot([b for b, _ in line], [value for _, value in line], label=name, **style)
    _maybe_log(axes, [value for line in lines.values() for _, value in line])
    axes.set_xlabel("block")
    words = {"mse": "mean squared error", "relative": "relative error", "cosine": "cosine distance"}
    axes.set_ylabel(words[measure])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(lines) > 1:
        legend_above(axes)


def _maybe_log(axes: Axes, values: Sequence[float]) -> None:
    if values and min(values) > 0 and max(values) > _LOG_SPAN * min(values):
        logarithmic(axes.yaxis)


def _short(name: Any, parts: int = 1) -> str:
    """The last parts of a module path."""
    return ".".join(str(name).split(".")[-parts:])
