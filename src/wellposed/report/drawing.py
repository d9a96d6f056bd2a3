"""How panels are drawn. The one module that imports matplotlib; :mod:`wellposed.report.plots` loads it when needed."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, SupportsFloat

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator
from matplotlib.transforms import Affine2D
from numpy.typing import NDArray

from wellposed.report.pictures import INK, PAPER
from wellposed.report.series import Panel, Reference, Series, as_floats, decay_factor, fitted_slope
from wellposed.report.styles import MethodStyle, method_style

__all__ = ["SETTINGS", "draw_panels", "tick_label"]

QUIET = "#5b6673"
GRID = "#e3e7eb"

# In points, of which a browser makes CSS pixels: a panel is as wide as the text column of a phone.
WIDTH, AXES_HEIGHT = 360.0, 196.0
LEFT, RIGHT, BELOW, ABOVE, ABOVE_TITLED = 44.0, 12.0, 40.0, 26.0, 44.0
LEGEND_LINE, LEGEND_MARGIN = 13.5, 6.0

# Text stays text in the file, and the salt makes matplotlib's ids the same in every run.
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "wellposed",
    "figure.dpi": 72,
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.markersize": 5.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def draw_panels(figure: Figure, row: Sequence[Panel]) -> None:
    """Draw panels side by side into an empty figure, and give it its size."""
    legend = LEGEND_MARGIN + LEGEND_LINE * max(_legend_lines(panel) for panel in row)
    above = ABOVE_TITLED if any(panel.title for panel in row) else ABOVE
    width, height = WIDTH * len(row), above + AXES_HEIGHT + BELOW + legend
    figure.set_size_inches(width / 72, height / 72)
    for column, panel in enumerate(row):
        left = WIDTH * column
        box = (
            (left + LEFT) / width,
            (legend + BELOW) / height,
            (WIDTH - LEFT - RIGHT) / width,
            AXES_HEIGHT / height,
        )
        axes = figure.add_axes(box)
        handles = _draw_contents(axes, panel)
        _draw_titles(axes, panel)
        axes.legend(
            handles=handles,
            loc="upper left",
            bbox_to_anchor=(left + 8, legend),
            bbox_transform=Affine2D().scale(1 / 72) + figure.dpi_scale_trans,
            ncols=_legend_columns(panel),
            handlelength=2.6,
            columnspacing=1.4,
            labelspacing=0.3,
            borderpad=0,
            borderaxespad=0,
        )


def _draw_contents(axes: Axes, panel: Panel) -> list[Line2D]:
    axes.set_xscale(panel.xscale)
    axes.set_yscale(panel.yscale)
    handles = [_draw_series(axes, panel, series, position) for position, series in enumerate(panel.series)]
    for reference in panel.references:
        _draw_reference(axes, reference)
    _set_ticks(axes, panel)
    _draw_point_labels(axes, panel)
    return handles


def _draw_titles(axes: Axes, panel: Panel) -> None:
    axes.set_xlabel(panel.xlabel, labelpad=5)
    above: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    # Along the axis it would be read with the head tilted.
    axes.annotate(panel.ylabel, (0, 1), (8 - LEFT, 8), **above)
    if panel.title:
        axes.annotate(panel.title, (0, 1), (8 - LEFT, 25), fontweight="bold", fontsize=11, **above)


def _draw_series(axes: Axes, panel: Panel, series: Series, position: int) -> Line2D:
    """Draw one line; returns what stands for it in the legend."""
    style = method_style(series.method, position)
    x, y = as_floats(series.x), as_floats(series.y)
    if series.band is not None:
        low, high = as_floats(series.band[0]), as_floats(series.band[1])
        axes.fill_between(x, low, high, color=style.color, alpha=0.15, linewidth=0, zorder=2)
    if series.error is not None:
        bars: dict[str, Any] = {"ecolor": style.color, "elinewidth": 1, "capsize": 2, "zorder": 3}
        axes.errorbar(x, y, yerr=as_floats(series.error), fmt="none", **bars)
    look: dict[str, Any] = {
        "color": style.color,
        "linewidth": style.width,
        "marker": style.marker if panel.markers else "none",
        "markerfacecolor": PAPER if style.hollow else style.color,
        "markeredgecolor": style.color,
    }
    usable = np.isfinite(x) & np.isfinite(y)
    line: dict[str, Any] = {"color": style.color, "linewidth": style.width, "alpha": panel.connect}
    axes.plot(x[usable], y[usable], linestyle=style.dash, zorder=4, **line)
    if panel.markers:
        (points,) = axes.plot(x[usable], y[usable], zorder=5)
        points.set(**look, linestyle="none")
    return Line2D([], [], **look, linestyle=style.dash, label=_legend_label(panel, series, style))


def _draw_reference(axes: Axes, reference: Reference) -> None:
    look: dict[str, Any] = {"color": QUIET, "linestyle": (0, (4, 3)), "linewidth": 1.1, "zorder": 1.5}
    words: dict[str, Any] = {"textcoords": "offset points", "ha": "right", "color": QUIET, "fontsize": 8.5}
    if isinstance(reference.y, int | float) or reference.x is None:
        level = float(np.asarray(reference.y))
        axes.axhline(level, **look)
        axes.annotate(reference.label, (1, level), (-2, 3), xycoords=("axes fraction", "data"), va="bottom", **words)
        return
    x, y = as_floats(reference.x), as_floats(reference.y)
    axes.plot(x, y, **look)
    axes.annotate(reference.label, (x[-1], y[-1]), (0, -4), va="top", **words)


def _legend_label(panel: Panel, series: Series, style: MethodStyle) -> str:
    label = series.label or style.label
    if not panel.slopes:
        return label
    if panel.xscale == "log":
        slope = fitted_slope(series.x, series.y, panel.slope_range)
        return label if math.isnan(slope) else f"{label}: slope {slope:.2f}".replace("-", "−")
    factor = decay_factor(series.x, series.y, panel.slope_range)
    return label if math.isnan(factor) else f"{label}: ×{factor:.2g} per unit"


def _legend_columns(panel: Panel) -> int:
    labels = [
        _legend_label(panel, series, method_style(series.method, position))
        for position, series in enumerate(panel.series)
    ]
    longest = max(map(len, labels))
    return 3 if longest <= 15 and len(labels) > 4 else 2 if longest <= 22 else 1


def _legend_lines(panel: Panel) -> int:
    return -(-len(panel.series) // _legend_columns(panel))


def _set_ticks(axes: Axes, panel: Panel) -> None:
    xticks = panel.xticks
    if xticks is None:
        positions = sorted({v for series in panel.series for v in as_floats(series.x).tolist() if math.isfinite(v)})
        xticks = tuple(positions) if len(positions) <= 8 else ()
    if xticks:
        axes.xaxis.set_major_locator(FixedLocator(list(xticks)))
        axes.xaxis.set_major_formatter(FuncFormatter(tick_label))
        axes.xaxis.set_minor_locator(NullLocator())
    elif panel.xscale == "log":
        _set_log_ticks(axes.xaxis)
    if panel.yscale == "log":
        _set_log_ticks(axes.yaxis)


def _set_log_ticks(axis: Any) -> None:
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,)))
    axis.set_major_formatter(FuncFormatter(tick_label))
    axis.set_minor_locator(NullLocator())


def tick_label(value: SupportsFloat, position: int | None = None) -> str:
    """Plain digits where they are short, else a power of ten with Unicode superscripts.

    ``position`` is what matplotlib hands to a formatter, and unused.
    """
    value = float(value)
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:g}".replace("-", "−")
    mantissa, exponent = f"{value:e}".split("e")
    power = "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
    return power if float(mantissa) == 1 else f"{float(mantissa):g}·{power}".replace("-", "−")


def _draw_point_labels(axes: Axes, panel: Panel) -> None:
    """Write the labels of points where they hide least: of eight places around each point the emptiest."""
    to_points = axes.transData.transform
    obstacles = _points_on_lines(panel, to_points)
    corner, opposite = axes.transAxes.transform([(0, 0), (1, 1)])
    for position, series in enumerate(panel.series):
        color = method_style(series.method, position).color
        x, y = as_floats(series.x), as_floats(series.y)
        for text, x_i, y_i in zip(series.point_labels or (), x.tolist(), y.tolist(), strict=False):
            if not text or not math.isfinite(x_i) or not math.isfinite(y_i):
                continue
            place = to_points((x_i, y_i))
            size = np.array([4.9 * len(text), 7.0])
            boxes = [(place + offset - size / 2, place + offset + size / 2) for offset in _places_around(size)]
            crowding = [
                _count_inside(obstacles, low, high) + 100 * bool((low < corner).any() or (high > opposite).any())
                for low, high in boxes
            ]
            low, high = boxes[int(np.argmin(crowding))]
            # Labels written earlier count as full of points.
            inside = np.stack(np.meshgrid(*(np.linspace(a, b, 5) for a, b in zip(low, high, strict=True))), -1)
            obstacles = np.concatenate([obstacles, inside.reshape(-1, 2)])
            middle = (low + high) / 2 - place
            axes.annotate(
                text,
                (x_i, y_i),
                (float(middle[0]), float(middle[1])),
                textcoords="offset points",
                ha="center",
                va="center",
                color=color,
                fontsize=8,
                zorder=6,
            )


def _places_around(size: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    reach = size / 2 + 5
    directions = [(0, -1), (0, 1), (-1, 0), (1, 0), (-0.8, -0.8), (0.8, -0.8), (-0.8, 0.8), (0.8, 0.8)]
    return [reach * np.array(direction) for direction in directions]


def _count_inside(points: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64]) -> int:
    return int(((points > low) & (points < high)).all(axis=1).sum())


def _points_on_lines(panel: Panel, to_points: Any) -> NDArray[np.float64]:
    """Places that the panel's lines cover, about two points of length apart."""
    covered = [np.empty((0, 2))]
    for series in panel.series:
        corners = np.stack([as_floats(series.x), as_floats(series.y)], axis=1)
        corners = to_points(corners[np.isfinite(corners).all(axis=1)])
        covered.append(corners)
        for start, end in pairwise(corners):
            count = max(2, int(np.linalg.norm(end - start) / 2))
            covered.append(start + np.linspace(0, 1, count)[:, None] * (end - start))
    return np.concatenate(covered)
