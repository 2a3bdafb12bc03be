"""Scales, marks and plots. A template draws them as SVG, and the page's CSS colours them.

Why not a plotting library: the page must be readable without scripts, be printable, switch between
light and dark without redrawing, give every mark a name and a position in the keyboard order, and
use one block axis for a table, bars and a matrix. The library bundles below 3 MB (plotly.js basic,
bokeh, vega) draw in the browser, to canvas or to SVG with fixed colours, and take 0.8 to 1.3 MB per
page; these charts take a few kB and need no dependency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isingcut.report.rows import Row

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
            decades = range(
                math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1
            )
            for digits in ((1, 2, 5), (1, 3), (1,)):
                found = [
                    d * 10.0**e
                    for e in decades
                    for d in digits
                    if self.low <= d * 10.0**e <= self.high
                ]
                if len(found) <= count + 2:
                    break
            if len(found) >= 2:
                return found
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(
            m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9)
        )
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


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
        low = low - around
        high = high + around
    air = 0.06 * (high - low)
    return Scale(
        low if zero and low == 0 else low - air,
        high if zero and high == 0 else high + air,
        start,
        end,
    )


def tick_text(ticks: Sequence[float]) -> list[str]:
    """Format axis labels, with enough digits to tell the ticks apart."""
    large = max(abs(t) for t in ticks)
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e5, 1e3, "k")):
        if large >= least:
            return [
                f"{t / unit:.4g}{letter}".replace("-", "−") if t else "0" for t in ticks
            ]
    gaps = np.diff(ticks)
    if (large and large < 1e-3) or not np.allclose(gaps, gaps.mean()):
        return [f"{t:.3g}".replace("-", "−") for t in ticks]
    for digits in range(6):
        shown = [f"{t:.{digits}f}" for t in ticks]
        exact = all(
            abs(float(s) - t) <= 1e-6 * (abs(t) or large)
            for s, t in zip(shown, ticks, strict=True)
        )
        if exact and len(set(shown)) == len(ticks):
            break
    return [s.replace("-", "−") for s in shown]


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
        both = [(axis, axis.ticks()) for axis in (self.x, self.y)]
        return [list(zip(map(axis, v), tick_text(v), strict=True)) for axis, v in both]

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
        shape: str = "dot",
        error: float | None = None,
        state: int | None = None,
    ) -> None:
        """Add a mark with a tooltip, which the pointer and the arrow keys can reach.

        Args:
            x, y: position in data coordinates.
            tip: tooltip text; lines are separated by newlines.
            kind: CSS class.
            shape: ``dot``, ``ring`` or ``diamond``.
            error: standard error of ``y``.
            state: number of the state that a click shows.
        """
        ends = None if error is None else (self.y(y - error), self.y(y + error))
        look = {"tip": tip, "kind": kind, "shape": shape, "ends": ends, "state": state}
        self.marks.append({"x": self.x(x), "y": self.y(y), **look})


@dataclass(frozen=True)
class Figure:
    """A chart with its heading, its description and its data.

    Attributes:
        key: HTML id.
        title: heading.
        words: description in a sentence or two.
        plot: the chart, or None without data; ``words`` is then the reason.
        label: chart label for screen readers, which ``words`` follow.
        columns: headings of the data table.
        rows: rows of the data table.
        legend: pairs of a CSS class and its meaning.
    """

    key: str
    title: str
    words: str
    plot: Plot | None = None
    label: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    legend: Sequence[tuple[str, str]] = ()


def whisker(scale: Scale, value: float, low: float, high: float, key: str = "k") -> str:
    """Return the positions of a value and its interval in percent, as CSS properties."""
    a = scale(low)
    b = scale(high)
    return f"--{key}:{scale(value)}%;--a:{a}%;--w:{round(b - a, 2)}%"


def meter(row: Row, model: str, models: Sequence[str]) -> str:
    """Return the CSS properties of the bar under a figure: length and whisker; empty for no bar."""
    value = row.values.get(model)
    whole = row.whole or max(
        (v.high for m in models if (v := row.values.get(m))), default=0.0
    )
    if value is None or not whole or value.figure < 0:
        return ""
    scale = Scale(0.0, whole)
    if value.error is None:
        return f"--v:{scale(value.figure)}%"
    return whisker(scale, value.figure, value.low, value.high, "v")


def x_span(values: Iterable[float], *, zero: bool = False, log: bool = False) -> Scale:
    """Make the horizontal scale of a chart."""
    return span(values, LEFT, WIDTH - RIGHT, zero=zero, log=log)


def y_span(values: Iterable[float], *, zero: bool = False, log: bool = False) -> Scale:
    """Make the vertical scale of a chart."""
    return span(values, HEIGHT - BOTTOM, TOP, zero=zero, log=log)
