"""Line plots and plots of quality against cost, in one look; SVG.

A :class:`Panel` says what is to be seen; :func:`draw` makes the picture, :func:`panels` puts several into one file. On
a page give the pictures of the panels one by one: it sets them side by side, and below each other on a phone.

Needs matplotlib (``pip install wellposed[plots]``), which is imported on first use. The same panel gives the same
bytes. Labels are text in the file, so they take the reader's own font and can be searched.
"""

import io
from collections.abc import Sequence
from typing import Any

from wellposed.report.pictures import Picture
from wellposed.report.series import Number, Panel, Reference, Scale, Series, decay_factor, fitted_slope

__all__ = [
    "Panel",
    "Reference",
    "Series",
    "decay_factor",
    "draw",
    "fitted_slope",
    "lines",
    "panels",
    "scatter",
]

# Laid out with DejaVu Sans, which matplotlib brings and which is wider than what systems show instead.
_FONT_STACK = b"system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'DejaVu Sans', sans-serif"


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
    slope_range: tuple[Number, Number] | None = None,
    markers: bool = True,
    xticks: Sequence[Number] | None = None,
) -> Panel:
    """Lines with markers, error bars or bands.

    Args:
        series: one for each line; the legend below the axes keeps their order.
        xlabel: what lies on the horizontal axis, with its unit.
        ylabel: what lies on the vertical axis; written above it, not along it.
        title: short; the caption of the page says the rest.
        xscale: ``"linear"`` or ``"log"``.
        yscale: ``"linear"`` or ``"log"``.
        references: levels and laws to compare with.
        slopes: put each line's fit into the legend: :func:`fitted_slope` where both scales are logarithmic,
            :func:`decay_factor` where only ``yscale`` is.
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
    xticks: Sequence[Number] | None = None,
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
        ValueError: a series of an unknown method.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    return panels([panel])


def panels(row: Sequence[Panel]) -> Picture:
    """Several panels side by side in one SVG, for places that cannot set them themselves, such as a README.

    Raises:
        ValueError: no panels, or a series of an unknown method.
        ImportError: matplotlib is missing; the message says how to install it.
    """
    if not row:
        raise ValueError("no panels to draw; give at least one")
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    from wellposed.report.drawing import SETTINGS, draw_panels

    with matplotlib.rc_context(SETTINGS):
        figure = Figure()
        draw_panels(figure, row)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    width, height = figure.get_size_inches() * 72
    svg = buffer.getvalue().replace(b"'DejaVu Sans'", _FONT_STACK)
    return Picture(data=svg, media_type="image/svg+xml", width=round(float(width)), height=round(float(height)))


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib, which is not installed: pip install wellposed[plots]") from error
    return matplotlib
