"""Line plots and plots of quality against cost, in one look; SVG.

A :class:`Panel` says what is to be seen; :func:`draw` makes the picture, :func:`panels` puts several into one file. On
a page give the pictures of the panels one by one: it sets them side by side, and below each other on a phone.

Needs matplotlib (``pip install wellposed[plots]``), which is imported on first use. The same panel gives the same
bytes. Labels are text in the file, so they take the reader's own font and can be searched.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from wellposed.report.pictures import INK, PAPER, Picture
from wellposed.report.styles import MethodStyle, method_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Panel", "Reference", "Scale", "Series", "draw", "fitted_slope", "lines", "panels", "scatter"]

Scale = Literal["linear", "log"]
Numbers = Sequence[float | None]

PANEL_WIDTH, PANEL_HEIGHT = 5.0, 3.4  # inches; 360 CSS pixels wide, the width of a phone
LEGEND_LINE = 0.185
QUIET = "#5b6673"
GRID = "#e3e7eb"


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: what was measured of one method.

    Attributes:
        x: positions; None or nan leaves a point out.
        y: values; None or nan leaves a point out.
        method: key of :data:`wellposed.report.styles.METHOD_STYLES`, which gives colour, marker and label.
        label: instead of the method's own.
        error: half the height of the error bars.
        band: lower and upper edge of a shaded band.
        point_labels: a short text at each point; ``""`` for none.
    """

    x: Numbers
    y: Numbers
    method: str | None = None
    label: str | None = None
    error: Numbers | None = None
    band: tuple[Numbers, Numbers] | None = None
    point_labels: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.method is None and self.label is None:
            raise ValueError("a series has neither method nor label; give one, or the reader cannot tell it apart")
        parts = {"y": self.y, "error": self.error, "point_labels": self.point_labels}
        if self.band is not None:
            parts |= {"band[0]": self.band[0], "band[1]": self.band[1]}
        for name, values in parts.items():
            if values is not None and len(values) != len(self.x):
                raise ValueError(
                    f"{name} of the series {self.label or self.method!r} has {len(values)} entries for "
                    f"{len(self.x)} positions x; give one for each"
                )


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A thin dashed line to compare with: a level, or a law such as 3^-m.

    Attributes:
        label: written at the line.
        y: the level, or the values at ``x``.
        x: positions; None for a horizontal line across the panel.
    """

    label: str
    y: float | Numbers
    x: Numbers | None = None


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes and what is drawn in it; made by :func:`lines` or :func:`scatter`."""

    series: tuple[Series, ...]
    xlabel: str
    ylabel: str
    title: str | None
    xscale: Scale
    yscale: Scale
    references: tuple[Reference, ...]
    slopes: bool
    slope_range: tuple[float, float] | None
    connect: float
    markers: bool
    xticks: tuple[float, ...] | None

    def __post_init__(self) -> None:
        if not self.series:
            raise ValueError("a panel has no series; give at least one")
        for name, scale in (("xscale", self.xscale), ("yscale", self.yscale)):
            if scale not in ("linear", "log"):
                raise ValueError(f"{name} is {scale!r}; write 'linear' or 'log'")
        if self.slopes and self.yscale != "log":
            raise ValueError("slopes are fitted to logarithms; write yscale='log', or slopes=False")


def lines(
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    *,
    title: str | None = None,
    xscale: Scale = "linear",
    yscale: Scale = "linear",
    references: Sequence[Reference] = (),
    slopes: bool = False,
    slope_range: tuple[float, float] | None = None,
    markers: bool = True,
    xticks: Sequence[float] | None = None,
) -> Panel:
    """Lines with markers, error bars or bands.

    Args:
        series: one for each line; the legend below the axes keeps their order.
        xlabel: what lies on the horizontal axis, with its unit.
        ylabel: what lies on the vertical axis; written above it, not along it.
        title: short; the caption of the page says the rest.
        slopes: put each line's fitted slope into the legend: of log y over log x where both scales are logarithmic;
            over x itself, as a factor for each unit, where only ``yscale`` is.
        slope_range: fit within these values of x, both included; everywhere by default.
        markers: a sign at each point; False for curves of many points.
        xticks: where to put numbers on the horizontal axis; by default at every x, if they are few.

    Raises:
        ValueError: no series, an unknown scale, or slopes without a logarithmic ``yscale``.
    """
    return Panel(
        series=tuple(series),
        xlabel=xlabel,
        ylabel=ylabel,
        title=title,
        xscale=xscale,
        yscale=yscale,
        references=tuple(references),
        slopes=slopes,
        slope_range=slope_range,
        connect=1.0,
        markers=markers,
        xticks=None if xticks is None else tuple(xticks),
    )


def scatter(
    series: Sequence[Series],
    xlabel: str,
    ylabel: str,
    *,
    title: str | None = None,
    xscale: Scale = "log",
    yscale: Scale = "log",
    references: Sequence[Reference] = (),
    xticks: Sequence[float] | None = None,
) -> Panel:
    """Quality against cost: a point for each run, the runs of one method joined by a faint line.

    ``point_labels`` of a series name its points, for instance their number of steps. Arguments as of :func:`lines`.
    """
    return Panel(
        series=tuple(series),
        xlabel=xlabel,
        ylabel=ylabel,
        title=title,
        xscale=xscale,
        yscale=yscale,
        references=tuple(references),
        slopes=False,
        slope_range=None,
        connect=0.45,
        markers=True,
        xticks=() if xticks is None else tuple(xticks),
    )


def draw(panel: Panel) -> Picture:
    """The picture of one panel, as SVG.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    return panels([panel])


def panels(row: Sequence[Panel]) -> Picture:
    """Several panels side by side in one SVG, for places that cannot set them themselves, such as a README.

    Raises:
        ValueError: no panels.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    if not row:
        raise ValueError("no panels to draw; give at least one")
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    legend = LEGEND_LINE * max(_legend_lines(panel) for panel in row) + 0.1
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(PANEL_WIDTH * len(row), PANEL_HEIGHT + legend))
        for column, panel in enumerate(row):
            _draw_panel(figure, panel, column, len(row), legend)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches() * 72
    svg = buffer.getvalue().replace(b"'DejaVu Sans'", _FONT_STACK)
    return Picture(data=svg, media_type="image/svg+xml", width=round(float(width)), height=round(float(height)))


def fitted_slope(x: Numbers, y: Numbers) -> float:
    """Least-squares slope of log y over log x; nan with fewer than two usable points.

    Points that are not finite or not positive are left out.
    """
    x_values, y_values = _floats(x), _floats(y)
    usable = np.isfinite(x_values) & np.isfinite(y_values) & (x_values > 0) & (y_values > 0)
    return _fit(np.log(x_values[usable]), np.log(y_values[usable]))


# Text stays text in the file, and the salt makes matplotlib's ids the same in every run.
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "wellposed",
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
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
}
# Laid out with DejaVu Sans, which matplotlib brings and which is wider than what systems show instead.
_FONT_STACK = b"system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: pip install wellposed[plots]") from error
    return matplotlib


def _draw_panel(figure: Any, panel: Panel, column: int, columns: int, legend: float) -> None:
    width, height = PANEL_WIDTH * columns, PANEL_HEIGHT + legend
    left, right, bottom, top = 0.62, 0.2, 0.5 + legend, 0.62 if panel.title else 0.36
    box = (
        (PANEL_WIDTH * column + left) / width,
        bottom / height,
        (PANEL_WIDTH - left - right) / width,
        (height - bottom - top) / height,
    )
    axes = figure.add_axes(box)
    axes.set_xscale(panel.xscale)
    axes.set_yscale(panel.yscale)
    handles: list[Any] = []
    for position, series in enumerate(panel.series):
        handles.append(_draw_series(axes, panel, series, position))
    for reference in panel.references:
        _draw_reference(axes, panel, reference)
    _set_ticks(axes, panel)
    axes.set_xlabel(panel.xlabel, labelpad=5)
    # Along the axis it would be read with the head tilted.
    axes.annotate(
        panel.ylabel,
        (0, 1),
        (-0.45 * 72, 8),
        xycoords="axes fraction",
        textcoords="offset points",
        color=INK,
        va="bottom",
    )
    if panel.title:
        axes.annotate(
            panel.title,
            (0, 1),
            (-0.45 * 72, 25),
            xycoords="axes fraction",
            textcoords="offset points",
            va="bottom",
            fontweight="bold",
            fontsize=11,
        )
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(PANEL_WIDTH * column * 72 + 0.1 * 72, 2),
        bbox_transform=_points(figure),
        ncols=_legend_columns(panel),
        handlelength=2.0,
        columnspacing=1.4,
        labelspacing=0.3,
        borderpad=0.2,
        borderaxespad=0,
    )


def _points(figure: Any) -> Any:
    from matplotlib.transforms import Affine2D

    return Affine2D().scale(1 / 72) + figure.dpi_scale_trans


def _legend_label(panel: Panel, series: Series, style: MethodStyle) -> str:
    label = series.label or style.label
    if not panel.slopes:
        return label
    x, y = _floats(series.x), _floats(series.y)
    low, high = panel.slope_range or (-math.inf, math.inf)
    inside = (x >= low) & (x <= high)
    if panel.xscale == "log":
        slope = fitted_slope(list(x[inside]), list(y[inside]))
        return label if math.isnan(slope) else f"{label}: slope {slope:.2f}".replace("-", "−")
    usable = inside & np.isfinite(x) & np.isfinite(y) & (y > 0)
    slope = _fit(x[usable], np.log(y[usable]))
    return label if math.isnan(slope) else f"{label}: ×{math.exp(slope):.2g} each"


def _legend_columns(panel: Panel) -> int:
    longest = max(
        len(_legend_label(panel, series, method_style(series.method, position)))
        for position, series in enumerate(panel.series)
    )
    return 3 if longest <= 11 else 2 if longest <= 22 else 1


def _legend_lines(panel: Panel) -> int:
    return -(-len(panel.series) // _legend_columns(panel))


def _draw_series(axes: "Axes", panel: Panel, series: Series, position: int) -> Any:
    style = method_style(series.method, position)
    x, y = _floats(series.x), _floats(series.y)
    if series.band is not None:
        low, high = map(_floats, series.band)
        axes.fill_between(x, low, high, color=style.color, alpha=0.15, linewidth=0, zorder=2)
    if series.error is not None:
        axes.errorbar(
            x, y, yerr=_floats(series.error), fmt="none", ecolor=style.color, elinewidth=1, capsize=2, zorder=3
        )
    look: dict[str, Any] = {
        "color": style.color,
        "marker": style.marker if panel.markers else "none",
        "markerfacecolor": PAPER if style.hollow else style.color,
        "markeredgecolor": style.color,
    }
    usable = np.isfinite(x) & np.isfinite(y)
    axes.plot(x[usable], y[usable], color=style.color, linestyle=style.dash, alpha=panel.connect, zorder=4)
    (points,) = axes.plot(x[usable], y[usable], zorder=5)
    points.set(**look, linestyle="none")
    for x_i, y_i, text in zip(x, y, series.point_labels or (), strict=False):
        if text and math.isfinite(x_i) and math.isfinite(y_i):
            axes.annotate(text, (x_i, y_i), (4, 4), textcoords="offset points", color=style.color, fontsize=8, zorder=6)
    from matplotlib.lines import Line2D

    return Line2D([], [], **look, linestyle=style.dash, label=_legend_label(panel, series, style))


def _draw_reference(axes: "Axes", panel: Panel, reference: Reference) -> None:
    look: dict[str, Any] = {"color": QUIET, "linestyle": (0, (4, 3)), "linewidth": 1.1, "zorder": 1.5}
    if reference.x is None:
        level = float(reference.y)  # pyright: ignore[reportArgumentType]
        axes.axhline(level, **look)
        axes.annotate(
            reference.label,
            (1, level),
            (-2, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom",
            color=QUIET,
            fontsize=8.5,
        )
        return
    x, y = _floats(reference.x), _floats(reference.y)  # pyright: ignore[reportArgumentType]
    axes.plot(x, y, **look)
    axes.annotate(
        reference.label,
        (x[-1], y[-1]),
        (0, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        color=QUIET,
        fontsize=8.5,
    )


def _set_ticks(axes: "Axes", panel: Panel) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    xticks = panel.xticks
    if xticks is None:
        positions = sorted({float(v) for series in panel.series for v in _floats(series.x) if math.isfinite(v)})
        xticks = tuple(positions) if len(positions) <= 8 else ()
    if xticks:
        axes.xaxis.set_major_locator(FixedLocator(list(xticks)))
        axes.xaxis.set_minor_locator(NullLocator())
    for axis, scale in ((axes.xaxis, panel.xscale), (axes.yaxis, panel.yscale)):
        if scale == "linear" and not (axis is axes.xaxis and xticks):
            continue
        if not (axis is axes.xaxis and xticks):
            low, high = axis.get_view_interval()
            decades = math.log10(high / low) if low > 0 else 3
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,)))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(_tick_label))


def _tick_label(value: float, position: int | None = None) -> str:
    """Plain digits where they are short, else a power of ten with Unicode superscripts."""
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:g}".replace("-", "−")
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    mantissa = value / 10.0**exponent
    power = "10" + str(exponent).translate(_SUPERSCRIPTS)
    return power if abs(mantissa - 1) < 1e-6 else f"{mantissa:g}·{power}"


def _floats(values: Numbers) -> Any:
    return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)


def _fit(x: Any, y: Any) -> float:
    if len(set(x.tolist())) < 2:
        return math.nan
    return float(np.polyfit(x, y, 1)[0])
