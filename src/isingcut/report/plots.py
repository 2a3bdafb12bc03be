"""Scales, marks and plots. A template draws them as SVG, and the page's CSS colours them.

Why not a plotting library: the page has to stay readable without scripts, to print, to change
between light and dark without being drawn again, to give every mark a name and a place in the
keyboard's order, and to share one block axis between a table, bars and a matrix. The bundles
that fit 3 MB (plotly.js basic, bokeh, vega) draw in the browser, to canvas or to SVG with fixed
colours, and take 0.8 to 1.3 MB a page; these charts take a few kB and need no dependency.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

WIDTH, HEIGHT = 460.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 62.0, 14.0, 34.0, 50.0


@dataclass(frozen=True)
class Scale:
    """A value's place along an axis, linear or logarithmic.

    Args:
        low: value at ``start``.
        high: value at ``end``.
        start: coordinate of ``low``.
        end: coordinate of ``high``.
        log: logarithmic; ``low`` must be above 0.
    """

    low: float
    high: float
    start: float = 0.0
    end: float = 100.0
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of ``value``; values outside stay at the ends."""
        low, high, value = (
            (math.log(self.low), math.log(self.high), math.log(max(value, self.low)))
            if self.log
            else (self.low, self.high, value)
        )
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, count: int = 5) -> list[float]:
        """About ``count`` round values inside the axis."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
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
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [k * step for k in range(first, last + 1)]


def span(
    values: Iterable[float], start: float, end: float, *, zero: bool = False, log: bool = False
) -> Scale:
    """A scale that shows all values with a little air.

    Args:
        values: what is shown; values that are not finite are left out.
        start: coordinate of the low end.
        end: coordinate of the high end.
        zero: include 0 (a linear scale begins or ends there exactly).
        log: logarithmic where every value is above 0 and they span more than a factor of 12.
    """
    shown = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    low, high = min(shown), max(shown)
    if log and low > 0 and high / low > 12:
        return Scale(low / 1.25, high * 1.25, start, end, log=True)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low <= 1e-12 * max(abs(high), abs(low), 1e-300):
        around = abs(high) / 2 or 1.0
        low, high = low - around, high + around
    air = 0.06 * (high - low)
    return Scale(
        low if zero and low == 0 else low - air,
        high if zero and high == 0 else high + air,
        start,
        end,
    )


def tick_text(ticks: Sequence[float]) -> list[str]:
    """Axis labels with as many decimals as tell the ticks apart."""
    if not ticks:
        return []
    large = max(abs(t) for t in ticks)
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e5, 1e3, "k")):
        if large >= least:
            return [f"{t / unit:.4g}{letter}".replace("-", "−") if t else "0" for t in ticks]
    gaps = np.diff(ticks)
    if (large and large < 1e-3) or not np.allclose(gaps, gaps.mean() if len(gaps) else 0.0):
        return [f"{t:.3g}".replace("-", "−") for t in ticks]
    for digits in range(6):
        shown = [f"{t:.{digits}f}" for t in ticks]
        exact = all(
            abs(float(s) - t) <= 1e-6 * (abs(t) or large) for s, t in zip(shown, ticks, strict=True)
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
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
    """

    x: Scale
    y: Scale
    x_label: str
    y_label: str
    lines: list[tuple[str, str]] = field(default_factory=list)
    marks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ticks(self) -> list[list[tuple[float, str]]]:
        """Places and labels along both axes."""
        both = [(axis, axis.ticks()) for axis in (self.x, self.y)]
        return [list(zip(map(axis, v), tick_text(v), strict=True)) for axis, v in both]

    def line(self, points: Sequence[tuple[float, float]], kind: str = "") -> None:
        """Add a line through points in data coordinates."""
        self.lines.append((kind, " ".join(f"{self.x(a)},{self.y(b)}" for a, b in points)))

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
        """Add a mark that can be pointed at and reached with the arrow keys.

        Args:
            x, y: its place, in data coordinates.
            tip: what it says; lines are separated by newlines.
            kind: its CSS class.
            shape: ``dot``, ``ring`` or ``diamond``.
            error: the standard error of ``y``.
            state: number of the state that a click shows.
        """
        ends = None if error is None else (self.y(y - error), self.y(y + error))
        look = {"tip": tip, "kind": kind, "shape": shape, "ends": ends, "state": state}
        self.marks.append({"x": self.x(x), "y": self.y(y), **look})


@dataclass(frozen=True)
class Figure:
    """A chart with its name, what it says in words, and its data.

    Attributes:
        key: its id on the page.
        title: its heading.
        words: what it shows, in a sentence or two.
        plot: the chart, or None where its data are not there; ``words`` then says why.
        label: of the chart, for screen readers; ``words`` follow it.
        columns: of the data table.
        rows: of the data table.
        legend: pairs of a CSS class of the key and its meaning.
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
    """Where a value and its interval stand on a scale in percent, as properties for the CSS."""
    a, b = scale(low), scale(high)
    return f"--{key}:{scale(value)}%;--a:{a}%;--w:{round(b - a, 2)}%"


def x_span(values: Iterable[float], *, zero: bool = False, log: bool = False) -> Scale:
    """A horizontal scale of a chart."""
    return span(values, LEFT, WIDTH - RIGHT, zero=zero, log=log)


def y_span(values: Iterable[float], *, zero: bool = False, log: bool = False) -> Scale:
    """A vertical scale of a chart."""
    return span(values, HEIGHT - BOTTOM, TOP, zero=zero, log=log)
