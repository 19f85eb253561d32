"""How every figure looks: readable in black and white, on white and on black, at any width.

Series differ by line style and marker, not only by color. Figures are drawn with a transparent
background in one placeholder ink, which becomes the text color of the page around the SVG.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectrim.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

INK = "#0a0b0c"
"""Stands for the text color; no other mark uses it."""

_LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
# Okabe and Ito's colors without yellow and black: told apart by color-blind readers, and with
# enough contrast on white and on black.
_COLORS = ("#1f80c4", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")

PAGE_WIDTH = 4.4
"""Inches of a figure on a page: as wide as a phone, so that its text is as large there as set."""

_SETTINGS: dict[Any, Any] = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#8a8a8a",
    "grid.alpha": 0.35,
    "grid.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 2.2,
    "legend.columnspacing": 1.2,
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
    "svg.fonttype": "path",
    "mathtext.default": "regular",
    # Names come from files and may hold a dollar sign, which must not start a formula.
    "text.parse_math": False,
}


@contextmanager
def new_figure(*, width: float = 5.6, height: float = 3.7, **grid: Any) -> Iterator[Any]:
    """A figure and its axes in our style; the style ends with the block.

    Args:
        width: inches.
        height: inches.
        **grid: passed to `Figure.subplots`.

    Yields:
        The figure and what `subplots` returned.

    Raises:
        MissingExtraError: matplotlib is absent.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing figures") from error
    settings: dict[Any, Any] = {**mpl.rcParamsDefault, **_SETTINGS}
    with mpl.rc_context(settings):
        # A bare figure has no window behind it, so no display and no state is touched.
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**grid)


def series_styles(count: int) -> list[dict[str, Any]]:
    """Line style, marker and color of each of `count` series.

    Each alone tells the first six apart; no two of the first 36 share both color and line.
    """
    return [
        {
            "linestyle": _LINES[(i + i // len(_COLORS)) % len(_LINES)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "color": _COLORS[i % len(_COLORS)],
            "markerfacecolor": _COLORS[i % len(_COLORS)] if i % 2 == 0 else "none",
        }
        for i in range(count)
    ]


def legend_above(axes: Axes, *, most: int = 3) -> None:
    """The legend over the axes, where it covers nothing, in as many columns as fit the width."""
    _, labels = axes.get_legend_handles_labels()
    if not labels:
        return
    figure: Any = axes.get_figure()
    # Ten characters to an inch at our size, and half an inch for the handle.
    fitting = int(figure.get_figwidth() / (0.6 + max(map(len, labels)) / 12))
    columns = max(1, min(most, fitting, len(labels)))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)


def logarithmic(axis: Axis) -> None:
    """A logarithmic axis with plain numbers, since powers need the formulas we switched off.

    Call it when everything is drawn: the data decide how fine the ticks are.
    """
    from matplotlib.axis import XAxis
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if isinstance(axis, XAxis):
        axis.axes.set_xscale("log")
    else:
        axis.axes.set_yscale("log")
    low, high = axis.get_data_interval()
    # Within two decades the powers alone would leave an axis with one number or none.
    subs = (1.0, 2.0, 5.0) if high < 100 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def svg_text(figure: Figure, *, name: str, label: str) -> str:
    """The figure as an SVG element to put into a page.

    Args:
        figure: drawn inside `new_figure`.
        name: unique on the page; ids of several figures would clash otherwise.
        label: what the picture shows, for readers who do not see it.
    """
    import matplotlib as mpl

    out = io.StringIO()
    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace(INK, "currentColor")
    # The page decides how wide it is.
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}"', 1)


def _attribute(text: str) -> str:
    from html import escape

    return escape(text, quote=True)


def save_figure(figure: Figure, path: str | Path, *, kind: str) -> None:
    """Write a `png` or `svg` on white, for papers and READMEs; the same figure, the same bytes."""
    import matplotlib as mpl

    with mpl.rc_context({**_SETTINGS, "svg.hashsalt": "spectrim"}):
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(path, format=kind, dpi=160, facecolor="white", metadata=metadata)
