"""Trade-offs over removals: quality against parameters, KV cache and measured speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isingcut.report.rows import Value
from isingcut.report.run_files import RemovalFiles, RunFiles
from isingcut.report.states import measured_kl
from isingcut.report.svg import Figure, Plot, x_span, y_span
from isingcut.report.words import listed

Place = Callable[[RemovalFiles], float | None]
"""Where along the horizontal axis a removal is; None where that was not measured."""


@dataclass(frozen=True)
class Axis:
    """What quality is traded for.

    Attributes:
        key: of the figure.
        title: of the figure.
        label: of the axis.
        sign: after a figure.
        whole: where the original is.
        more: a greater place is better (speed); else a smaller one (what is kept).
        place: of the removals of a run; None where the blocks' own costs are not known.
    """

    key: str
    title: str
    label: str
    sign: str
    whole: float
    more: bool
    place: Callable[[RunFiles], Place | None]

    def plot(self, points: Sequence[Point]) -> Plot:
        """Empty axes over all points and the original."""
        plot = Plot(
            x_span([self.whole, *(p.at for p in points)]),
            y_span([0.0, *(p.loss.high for p in points)], zero=True),
        )
        plot.axes(self.label, "KL to the original, nats/token")
        return plot


@dataclass(frozen=True)
class Point:
    """One removal on a trade-off.

    Attributes:
        at: place along the horizontal axis.
        loss: measured KL of the chosen state, or the ground state's energy where none is measured.
        measured: the loss is a measurement.
        removal: whose point it is.
        removed: its blocks.
    """

    at: float
    loss: Value
    measured: bool
    removal: RemovalFiles
    removed: list[int]


def _kept(files: RunFiles, key: str, total: float | None) -> Place | None:
    """Percent of a cost that a removal keeps; None for a model without it."""
    costs = [b.get(key) for b in files.blocks]
    known = [float(c) for c in costs if c is not None]
    whole = float(total or sum(known))
    if len(known) < len(costs) or not whole:
        return None

    def share(removal: RemovalFiles) -> float | None:
        best = removal.best
        if best is None:
            return None
        return 100 * (1 - float(sum(known[i] for i in best["removed"])) / whole)

    return share


def _speed_ratio(removal: RemovalFiles) -> float | None:
    """Measured decoding speed of the cut model over that of the original, in the same run."""
    found, key = removal.evaluation, "decode_tokens_per_second"
    if found is None or not found["before"].get(key) or not found["after"].get(key):
        return None
    return float(found["after"][key] / found["before"][key])


_PARAMETERS = Axis(
    "pareto-parameters", "Parameters", "parameters kept, %", " %", 100.0, False,
    lambda files: _kept(files, "parameters", files.run["blocks"]["total_parameters"]),
)  # fmt: skip
_CACHE = Axis(
    "pareto-cache", "KV cache", "KV cache kept, %", " %", 100.0, False,
    lambda files: _kept(files, "kv_bytes_per_token", None),
)  # fmt: skip
_SPEED = Axis(
    "pareto-speed", "Measured speed", "decode speed, × original", " ×", 1.0, True,
    lambda files: _speed_ratio,
)  # fmt: skip
AXES = (_PARAMETERS, _CACHE, _SPEED)


def points_of(files: RunFiles, axis: Axis) -> list[Point]:
    """All removals of a run that can be placed.

    A removal that is not measured is placed at its ground state's energy where that is in nats
    per token, and left out otherwise.
    """
    place = axis.place(files)
    unit = files.hamiltonian.unit if files.hamiltonian is not None else "arbitrary"
    points = []
    for removal in files.removals:
        at, best = None if place is None else place(removal), removal.best
        if at is None or best is None or ("kl" not in best and unit != "nats/token"):
            continue
        measured = "kl" in best
        loss = measured_kl(best) if measured else Value(float(best["energy"]))
        points.append(Point(at, loss, measured, removal, best["removed"]))
    return points


def front(points: Sequence[tuple[float, float]], *, more: bool) -> list[tuple[float, float]]:
    """The points that no other beats: further to the good side at no greater loss, left to right.

    Args:
        points: place and loss.
        more: a greater place is better (speed); else a smaller one (what is kept).
    """
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (-p[0] if more else p[0], p[1])):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return sorted(best)


def trade_off_figure(files: RunFiles, axis: Axis) -> Figure:
    """Measured KL of all removals of a run against what is left, and the front of the best."""
    if axis.place(files) is None:
        words = "The blocks of this model have none, or it is not known."
        return Figure(axis.key, axis.title, words)
    points = points_of(files, axis)
    if not points:
        return Figure(axis.key, axis.title, _absent(files, axis))
    plot = axis.plot(points)
    taken = [(axis.whole, 0.0), *((p.at, p.loss.figure) for p in points if p.measured)]
    plot.line(front(taken, more=axis.more), "front")
    plot.mark(axis.whole, 0.0, "the original model\nKL 0", "original", shape="diamond")
    rows = [("none", f"{axis.whole:.4g}{axis.sign}", "0", "the original", "")]
    for point in points:
        at = f"{point.at:.4g}{axis.sign}"
        what = "measured KL" if point.measured else "not measured; energy of the ground state"
        tip = (
            f"remove {point.removal.name}\n{axis.label.split(',')[0]}: {at}\n"
            f"{what} {point.loss.text()} nats/token"
        )
        plot.mark(
            point.at,
            point.loss.figure,
            tip,
            "chosen" if point.removal.own else "measured" if point.measured else "random",
            shape="dot" if point.measured else "ring",
            error=point.loss.error,
        )
        known = "measured" if point.measured else "energy only"
        rows.append((point.removal.name, at, point.loss.text(), known, listed(point.removed)))
    return Figure(
        axis.key,
        axis.title,
        _words(points),
        plot.svg(f"{axis.title} against KL. {_words(points)}"),
        ("removal", axis.label, "KL, nats/token", "how known", "blocks removed"),
        rows,
        _legend(points),
    )


def _absent(files: RunFiles, axis: Axis) -> str:
    if axis.more and any(r.evaluation is not None for r in files.removals):
        return "No speed was measured; a run that streams blocks from disk measures none."
    verb = "evaluate" if axis.more else "rank"
    return f"Nothing measured yet. Type `isingcut {verb} {files.arguments}`."


def _words(points: Sequence[Point]) -> str:
    count = len(points)
    words = f"{count} removal{'s' * (count > 1)} of this folder and the original."
    hollow = sum(not p.measured for p in points)
    if hollow:
        words += f" {hollow} not measured: hollow, at the energy of the ground state."
    return words


def _legend(points: Sequence[Point]) -> list[tuple[str, str]]:
    legend = [("original", "original"), ("chosen", "this removal")]
    if any(p.measured and not p.removal.own for p in points):
        legend.append(("measured", "other removals"))
    if any(not p.measured for p in points):
        legend.append(("random", "energy only"))
    return legend
