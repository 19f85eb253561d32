"""The figures of the studies: errors layer by layer, and quality against calibration text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from spectrim.report.drawing import INK, logarithmic, series_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LARGEST_GRID = 11
"""Panels of the layer errors; the table has the rest of a model with more projections."""

_LOG_SPAN = 4.0
"""Perplexities over windows are drawn logarithmically when they span more than this factor."""


class LayerErrors(Protocol):
    """What is drawn of one target."""

    @property
    def model(self) -> str:
        """Name of the result."""
        ...

    @property
    def block(self) -> int:
        """Index of the block."""
        ...

    @property
    def projection(self) -> str:
        """Path inside the block."""
        ...

    @property
    def predicted(self) -> float | None:
        """Relative error that the decomposition promised."""
        ...

    @property
    def held_out(self) -> float:
        """Relative error on the evaluation text."""
        ...


def shown_projections(errors: Sequence[LayerErrors]) -> list[str]:
    """The projections that get a panel, in the order of a block."""
    return list(dict.fromkeys(one.projection for one in errors))[:LARGEST_GRID]


def draw_layer_errors(panels: Sequence[Axes], errors: Sequence[LayerErrors]) -> None:
    """One panel per projection, blocks across; measured lines with markers, predicted ones thin.

    Args:
        panels: one per projection and one more for the legend; further ones stay empty.
        errors: of all targets of one or several results.
    """
    from matplotlib.lines import Line2D

    projections = shown_projections(errors)
    models = list(dict.fromkeys(one.model for one in errors))
    styles = dict(zip(models, series_styles(len(models)), strict=True))
    values = [v for one in errors for v in (one.predicted, one.held_out) if v is not None and v > 0]
    for axes, projection in zip(panels, projections, strict=False):
        for model in models:
            chosen = [e for e in errors if (e.model, e.projection) == (model, projection)]
            _draw_lines(axes, chosen, styles[model])
        axes.set_title(projection, fontsize=10)
        axes.tick_params(labelsize=9)
        if values:
            low, high = min(values), max(values)
            # One scale for all panels, so that projections can be compared too.
            axes.yaxis.set_data_interval(low, high, ignore=True)
            logarithmic(axes.yaxis)
            axes.set_ylim(low / 1.3, high * 1.3)
        axes.xaxis.set_major_locator(_whole_numbers())
    for axes in panels[len(projections) :]:
        axes.set_axis_off()
    figure = panels[0].figure
    figure.supxlabel("block", fontsize=10)
    figure.supylabel("relative squared error of a layer's output", fontsize=10)
    handles = [Line2D([], [], label=model, **_line(styles[model])) for model in models]
    thin = {"color": INK, "linewidth": 1}
    handles.append(Line2D([], [], label="held-out text", marker="o", linestyle="-", **thin))
    if any(one.predicted is not None for one in errors):
        handles.append(Line2D([], [], label="predicted", linestyle=":", **thin))
    panels[len(projections)].legend(handles=handles, loc="center", fontsize=10)


def _draw_lines(axes: Axes, errors: Sequence[LayerErrors], style: Mapping[str, Any]) -> None:
    axes.plot([e.block for e in errors], [e.held_out for e in errors], **_line(style))
    told = [(e.block, e.predicted) for e in errors if e.predicted is not None and e.predicted > 0]
    axes.plot(
        [block for block, _ in told],
        [value for _, value in told],
        color=style["color"],
        linestyle=":",
        linewidth=1.1,
        marker=style["marker"],
        markersize=2.5,
    )


def _line(style: Mapping[str, Any]) -> dict[str, Any]:
    """The style with a solid line: dots mean predictions here, markers tell results apart."""
    return {**style, "linestyle": "-", "linewidth": 1.2, "markersize": 4.5}


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True, nbins=6)


def draw_calibration(
    axes: Axes, points: Sequence[Mapping[str, Any]], *, dense: float, keep: float
) -> None:
    """Perplexity against the number of calibration windows, one line per recipe.

    The line goes through the mean over seeds, and small marks show every seed.

    Args:
        axes: to draw on.
        points: records with `recipe`, `windows`, `seed` and `perplexity`.
        dense: perplexity of the dense model.
        keep: asked for.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    recipes = list(dict.fromkeys(point["recipe"] for point in points))
    counts = sorted({point["windows"] for point in points})
    for recipe, style in zip(recipes, series_styles(len(recipes)), strict=True):
        found = {
            count: [
                p["perplexity"] for p in points if (p["recipe"], p["windows"]) == (recipe, count)
            ]
            for count in counts
        }
        means = {count: statistics.fmean(values) for count, values in found.items() if values}
        axes.plot(list(means), list(means.values()), label=recipe, **style)
        for count, values in found.items():
            if len(values) > 1:
                ends = [min(values), max(values)]
                axes.plot([count] * 2, ends, color=style["color"], linewidth=1)
                axes.plot(
                    [count] * len(values),
                    values,
                    color=style["color"],
                    linestyle="none",
                    marker="_",
                    markersize=7,
                )
    axes.axhline(dense, color=INK, linewidth=1, linestyle=(0, (2, 3)), label="dense")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    values = [point["perplexity"] for point in points]
    if max(values) > _LOG_SPAN * dense:
        logarithmic(axes.yaxis)
    axes.set_xlabel("calibration windows")
    axes.set_ylabel(f"perplexity at keep {keep:g}")
    axes.legend()
