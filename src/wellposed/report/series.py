"""What is drawn: lines, references to compare them with, and the axes they share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Number",
    "Numbers",
    "Panel",
    "Reference",
    "Scale",
    "Series",
    "as_floats",
    "decay_factor",
    "fitted_slope",
    "smoothed",
]

Scale = Literal["linear", "log"]
# int is named beside float for checkers at run time, which do not take one for the other.
Number = float | int
Numbers = Sequence[Number | None]


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

    Raises:
        ValueError: neither method nor label, or parts of unequal length.
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
        low, high = self.band or (None, None)
        parts = {"y": self.y, "error": self.error, "point_labels": self.point_labels, "band[0]": low, "band[1]": high}
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

    Raises:
        ValueError: a level where there are positions, or several values without positions.
    """

    label: str
    y: Number | Numbers
    x: Numbers | None = None

    def __post_init__(self) -> None:
        if isinstance(self.y, int | float) != (self.x is None):
            raise ValueError(
                f"the reference {self.label!r} needs one number y and no x for a level, or as many y as x for a law"
            )


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes and what is drawn in it; see :func:`wellposed.report.plots.lines` for the fields.

    Attributes:
        connect: opacity of the lines between the points.
        markers: whether points have signs.

    Raises:
        ValueError: no series, an unknown scale, or slopes without a logarithmic ``yscale``.
    """

    series: tuple[Series, ...]
    xlabel: str
    ylabel: str
    title: str | None
    xscale: Scale
    yscale: Scale
    references: tuple[Reference, ...]
    slopes: bool
    slope_range: tuple[Number, Number] | None
    connect: float
    markers: bool
    xticks: tuple[Number, ...] | None

    def __post_init__(self) -> None:
        if not self.series:
            raise ValueError("a panel has no series; give at least one")
        for name, scale in (("xscale", self.xscale), ("yscale", self.yscale)):
            if scale not in ("linear", "log"):
                raise ValueError(f"{name} is {scale!r}; write 'linear' or 'log'")
        if self.slopes and self.yscale != "log":
            raise ValueError("slopes are fitted to logarithms; write yscale='log', or slopes=False")


def as_floats(values: Numbers) -> NDArray[np.float64]:
    """The values as float64, None as nan."""
    return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)


def fitted_slope(x: Numbers, y: Numbers, within: tuple[Number, Number] | None = None) -> float:
    """Least-squares slope of log y over log x: the order of a rate, -2 for y = c / x**2.

    Args:
        x: positions.
        y: values.
        within: use only these positions, both ends included.

    Returns:
        The slope; nan with fewer than two usable points. Points not finite or not positive are left out.
    """
    positions, values = _usable(x, y, within)
    return _least_squares(np.log(positions[positions > 0]), np.log(values[positions > 0]))


def decay_factor(x: Numbers, y: Numbers, within: tuple[Number, Number] | None = None) -> float:
    """By what y is multiplied each time x grows by one, by least squares on log y: 1/3 for y = c 3**-x.

    Arguments and nan as in :func:`fitted_slope`; x may be zero or negative.
    """
    positions, values = _usable(x, y, within)
    return math.exp(_least_squares(positions, np.log(values)))


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Means over ``window`` neighbouring values, fewer at the ends; nan where there is no finite one."""
    means: list[float] = []
    for index in range(len(values)):
        near = [v for v in values[max(0, index - window // 2) : index + window // 2 + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means


def _usable(
    x: Numbers, y: Numbers, within: tuple[Number, Number] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    positions, values = as_floats(x), as_floats(y)
    low, high = within or (-math.inf, math.inf)
    usable = np.isfinite(positions) & np.isfinite(values) & (values > 0) & (positions >= low) & (positions <= high)
    return positions[usable], values[usable]


def _least_squares(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    if len(set(x.tolist())) < 2:
        return math.nan
    return float(np.polyfit(x, y, 1)[0])
