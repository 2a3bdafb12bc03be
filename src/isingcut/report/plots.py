"""Scales, marks and plots. A template draws them as SVG, and the page's CSS colours them.

Why not a plotting library: the page must be readable without scripts, be printable, switch between
light and dark without redrawing, give every mark a name and a position in the keyboard order, and
use one block axis for a table, bars and a matrix. The library bundles below 3 MB (plotly.js basic,
bokeh, vega) draw in the browser, to canvas or to SVG with fixed colours, and take 0.8 to 1.3 MB per
page; these charts take a few kB and need no dependency.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from isingcut.report.rows import Row, plus_minus

WIDTH = 460.0
HEIGHT = 300.0
LEFT = 62.0
RIGHT = 14.0
TOP = 34.0
BOTTOM = 50.0


@dataclass(frozen=True)
class Scale:
    """A map from values to coordinates along an axis, linear or logarithmic.

    Args:
        low: value at ``start``.
        high: value at ``end``.
        start: coordinate of ``low``.
        end: coordinate of ``high``.
        log: whether the scale is logarithmic; ``low`` must then be above 0.
    """

    low: float
    high: float
    start: float = 0.0
    end: float = 100.0
    log: bool = False

    def __call__(self, value: float) -> float:
        """Return the coordinate of ``value``; values outside the scale are clipped to its ends."""
        low = self.low
        high = self.high
        if self.log:
            low, high, value = map(math.log, (low, high, max(value, low)))
        return round(float(np.interp(value, (low, high), (self.start, self.end))), 2)

    def ticks(self, count: int = 5) -> list[float]:
        """Return about ``count`` round values within the scale."""
        if self.log:
            near = np.geomspace(self.low, self.high, count + 1)
            rounded = {float(f"{value:.1g}") for value in near}
            return sorted(t for t in rounded if self.low <= t <= self.high)
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(
            m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9)
        )
        first = math.ceil(self.low / step - 1e-9)
        steps = np.arange(first, self.high / step + 1e-9)
        return [k * step for k in steps.tolist()]


def span(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    zero: bool = False,
    log: bool = False,
) -> Scale:
    """Make a scale that covers all values, with a small margin.

    Args:
        values: values to cover; those that are not finite are ignored.
        start: coordinate of the low end.
        end: coordinate of the high end.
        zero: whether to include 0 (a linear scale begins or ends exactly there).
        log: whether to use a logarithmic scale if all values are above 0 and span more than a
            factor of 12.
    """
    shown = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low = min(shown)
    high = max(shown)
    if log and low > 0 and high / low > 12:
        return Scale(low / 1.25, high * 1.25, start, end, log=True)
    if zero:
        low = min(low, 0.0)
        high = max(high, 0.0)
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        around = abs(high) / 2 or 1.0
        low -= around
        high += around
    air = 0.06 * (high - low)
    low -= air * (low != 0 or not zero)
    high += air * (high != 0 or not zero)
    return Scale(low, high, start, end)


x_span = partial(span, start=LEFT, end=WIDTH - RIGHT)
y_span = partial(span, start=HEIGHT - BOTTOM, end=TOP)


def tick_text(tick: float) -> str:
    """Format the label of a tick."""
    return f"{tick:,.10g}".replace("-", "−")


@dataclass
class Plot:
    """One chart with two axes, which `macros.html.j2` draws: lines below, marks above.

    Args:
        x: horizontal scale.
        y: vertical scale.
        x_label: label of the horizontal axis.
        y_label: label of the vertical axis.
    """

    x: Scale
    y: Scale
    x_label: str
    y_label: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ticks(self) -> list[list[tuple[float, str]]]:
        """Coordinates and labels of the ticks, for each axis."""
        return [
            [(axis(tick), tick_text(tick)) for tick in axis.ticks()]
            for axis in (self.x, self.y)
        ]

    def line(self, points: Sequence[tuple[float, float]], kind: str = "") -> None:
        """Add a line through points in data coordinates."""
        self.lines.append(
            (kind, " ".join(f"{self.x(a)},{self.y(b)}" for a, b in points))
        )

    def mark(
        self,
        x: float,
        y: float,
        tip: str,
        kind: str,
        *,
        error: float | None = None,
        state: int | None = None,
    ) -> None:
        """Add a mark with a tooltip, which the pointer and the arrow keys can reach.

        Args:
            x, y: position in data coordinates.
            tip: tooltip text; lines are separated by newlines.
            kind: CSS class; ``original`` is a diamond, ``random`` a ring, any other a dot.
            error: standard error of ``y``.
            state: number of the state that a click shows.
        """
        ends = None if error is None else (self.y(y - error), self.y(y + error))
        row = (tip.split("\n")[0], f"{x:.5g}", plus_minus(y, error))
        self.marks.append(
            {
                "x": self.x(x),
                "y": self.y(y),
                "row": row,
                "tip": tip,
                "kind": kind,
                "ends": ends,
                "state": state,
            }
        )


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and its description; a table below it lists its marks.

    Attributes:
        key: HTML id.
        title: heading.
        words: description in a sentence or two.
        plot: the chart, or None without data; ``words`` is then the reason.
        legend: meanings of CSS classes.
    """

    key: str
    title: str
    words: str
    plot: Plot | None = None
    legend: Mapping[str, str] = field(default_factory=dict)


def meter(row: Row, model: str, models: Sequence[str]) -> str:
    """Return the CSS properties of the bar under a figure: length and whisker; empty for no bar."""
    value = row.values.get(model)
    whole = row.whole or max(
        (v.high for m in models if (v := row.values.get(m))), default=0.0
    )
    if value is None or not whole or value.figure < 0:
        return ""
    scale = Scale(0.0, whole)
    length = f"--v:{scale(value.figure)}%"
    if value.error is None:
        return length
    low = scale(value.low)
    return f"{length};--a:{low}%;--w:{round(scale(value.high) - low, 2)}%"
