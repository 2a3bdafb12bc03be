"""Trade-offs over all removals of a run folder: quality against parameters, KV cache and speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from isingcut.report.run_files import Removal, RunFiles
from isingcut.report.svg import Figure, Plot, x_span, y_span
from isingcut.report.words import listed, plus_minus

Place = Callable[[Removal], float | None]
"""Where along the horizontal axis a removal is; None where that was not measured."""


@dataclass(frozen=True)
class Point:
    """One removal on a trade-off.

    Attributes:
        at: place along the horizontal axis.
        loss: measured KL of the chosen state, or the ground state's energy where none is measured.
        error: standard error of a measured loss.
        measured: the loss is a measurement.
        removal: whose point it is.
        removed: its blocks.
    """

    at: float
    loss: float
    error: float | None
    measured: bool
    removal: Removal
    removed: list[int]


def kept_parameters(files: RunFiles) -> Place | None:
    """Percent of all parameters that a removal keeps; None where the blocks' own are not known."""
    return _kept(files, "parameters", files.run["blocks"].get("total_parameters"))


def kept_cache(files: RunFiles) -> Place | None:
    """Percent of the KV cache that a removal keeps; None for a model without one."""
    return _kept(files, "kv_bytes_per_token", None)


def _kept(files: RunFiles, key: str, total: float | None) -> Place | None:
    costs = [b.get(key) for b in files.blocks]
    known = [float(c) for c in costs if c is not None]
    whole = float(total or sum(known))
    if len(known) < len(costs) or not whole:
        return None

    def share(removal: Removal) -> float | None:
        best = removal.best
        if best is None:
            return None
        return 100 * (1 - float(sum(known[i] for i in best["removed"])) / whole)

    return share


def speed_ratio(removal: Removal) -> float | None:
    """Measured decoding speed of the cut model over that of the original, in the same run."""
    found, key = removal.evaluation, "decode_tokens_per_second"
    if found is None or not found["before"].get(key) or not found["after"].get(key):
        return None
    return float(found["after"][key] / found["before"][key])


def trade_off_points(files: RunFiles, place: Place) -> list[Point]:
    """All removals of a run that can be placed.

    A removal that is not measured is placed at its ground state's energy where that is in nats
    per token, and left out otherwise.
    """
    unit = files.hamiltonian.unit if files.hamiltonian is not None else "arbitrary"
    points = []
    for removal in files.removals:
        at, best = place(removal), removal.best
        if at is None or best is None or ("kl" not in best and unit != "nats/token"):
            continue
        measured = "kl" in best
        loss = float(best["kl"] if measured else best["energy"])
        points.append(Point(at, loss, best.get("kl_se"), measured, removal, best["removed"]))
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


def trade_off_figures(files: RunFiles) -> list[Figure]:
    """Measured KL against what is left of parameters and KV cache, and against measured speed."""
    return [
        _figure(files, "parameters", "Parameters", "parameters kept, %", kept_parameters(files)),
        _figure(files, "cache", "KV cache", "KV cache kept, %", kept_cache(files)),
        _figure(files, "speed", "Measured speed", "decode speed, × original", speed_ratio),
    ]


def _figure(files: RunFiles, key: str, title: str, label: str, place: Place | None) -> Figure:
    key, fast = f"pareto-{key}", place is speed_ratio
    if place is None:
        return Figure(key, title, "The blocks of this model have none, or it is not known.")
    points = trade_off_points(files, place)
    if not points:
        verb = "evaluate" if fast else "rank"
        words = f"Nothing measured yet. Type `isingcut {verb} {files.arguments}`."
        if fast and any(r.evaluation is not None for r in files.removals):
            words = "No speed was measured; a run that streams blocks from disk measures none."
        return Figure(key, title, words)
    whole, sign = (1.0, " ×") if fast else (100.0, " %")
    ends = [p.loss + (p.error or 0.0) for p in points]
    plot = Plot(x_span([whole, *(p.at for p in points)]), y_span([0.0, *ends], zero=True))
    plot.axes(label, "KL to the original, nats/token")
    taken = [(whole, 0.0), *((p.at, p.loss) for p in points if p.measured)]
    plot.line(front(taken, more=fast), "front")
    plot.mark(whole, 0.0, "the original model\nKL 0", "original", shape="diamond")
    rows = [("none", f"{whole:.4g}{sign}", "0", "the original", "")]
    for point in points:
        loss = plus_minus(point.loss, point.error)
        kind = "chosen" if point.removal.own else "measured" if point.measured else "random"
        what = "measured KL" if point.measured else "not measured; energy of the ground state"
        plot.mark(
            point.at,
            point.loss,
            f"remove {point.removal.name}\n{label.split(',')[0]}: {point.at:.4g}{sign}\n"
            f"{what} {loss} nats/token",
            kind,
            shape="dot" if point.measured else "ring",
            error=point.error,
        )
        rows.append(
            (
                point.removal.name,
                f"{point.at:.4g}{sign}",
                loss,
                "measured" if point.measured else "energy only",
                listed(point.removed),
            )
        )
    return Figure(
        key,
        title,
        _words(points),
        plot.svg(f"{title} against KL. {_words(points)}"),
        ("removal", label, "KL, nats/token", "how known", "blocks removed"),
        rows,
        _legend(points),
    )


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
