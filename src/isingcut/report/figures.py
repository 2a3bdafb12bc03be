"""The figures of a report: the map of low-energy states, h, J and the charts.

The map, the fields h and the couplings J have the same columns on the page, so that a block is at
the same horizontal position in all three.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isingcut.files.healings import HealingFile
from isingcut.files.states import MeasuredState
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Bools, Floats, states_of
from isingcut.report.plots import Figure, Plot, Scale, span, whisker, x_span, y_span
from isingcut.report.rows import CUT_RANKING, Value, kl_of, plus_minus
from isingcut.report.run_files import RunFiles
from isingcut.report.states import Book, KnownState
from isingcut.report.words import join_blocks, sentence

# The block axis -----------------------------------------------------------------------

MAP_ROWS = 20
# A few couplings are much larger than the rest. Colour is full from this quantile of |J| on and
# grows with this power of |J| below it, so that the smaller couplings are visible.
SATURATION = 0.95
ROOT = 0.6


def map_rows(
    files: RunFiles, states: Book
) -> tuple[list[tuple[KnownState, str]], Scale]:
    """Return the lowest states and the chosen one, each with its `dots`, and the margin's scale."""
    candidates = states.of("candidate")
    shown = [
        s for k, s in enumerate(candidates) if k < MAP_ROWS or s.chosen
    ] + states.of("named")
    scale = margin_scale(files, shown)
    return [(s, dots(s, scale, energies=files.comparable)) for s in shown], scale


def margin_scale(files: RunFiles, states: list[KnownState]) -> Scale:
    """Make the scale of measured KL and comparable energies, in percent of the margin's width."""
    losses = [state.kl for state in states if state.kl is not None]
    values = [end for kl in losses for end in (kl.low, kl.high)]
    if files.comparable:
        values += [state.energy for state in states if state.energy is not None]
    return span(values, 2.0, 98.0)


def dots(state: KnownState, scale: Scale, *, energies: bool) -> str:
    """Return the positions of a state's marks in the margin, as CSS properties in percent."""
    style = []
    if energies and state.energy is not None:
        style.append(f"--e:{scale(state.energy)}%")
    if state.kl is not None:
        style.append(whisker(scale, state.kl.figure, state.kl.low, state.kl.high))
    return ";".join(style)


def block_ticks(n: int) -> list[tuple[int, float]]:
    """Return at most nine block numbers along the axis, with their positions in percent."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500) if n <= 9 * s)
    return [(i, round(100 * (i + 0.5) / n, 3)) for i in range(0, n, step)]


def draw_fields(energy: Hamiltonian, kinds: Sequence[str]) -> dict[str, Any]:
    """Draw the fields h_i as bars, on a logarithmic scale if all are positive and differ much.

    Returns:
        ``bars``, the top and height of each bar in percent; ``ticks``, the labels of the vertical
        axis with their distance from the top in percent; ``log``, whether the axis is logarithmic;
        ``words``, a description; ``rows`` of block, kind and figure with its error.
    """
    h = energy.h.tolist()
    scale = span(h, 96.0, 6.0, log=True)
    scale = scale if scale.log else span(h, 96.0, 6.0, zero=True)
    base = 98.0 if scale.log else scale(0.0)
    ends = [sorted((scale(value), base)) for value in h]
    bars = [(top, max(foot - top, 0.6)) for top, foot in ends]
    order = np.argsort(h).tolist()
    named = [f"block {i} ({h[i]:.3g})" for i in order]
    words = (
        f"Costliest alone: {', '.join(named[:-4:-1])}; cheapest: {', '.join(named[:3])} "
        f"({energy.unit})."
    )
    errors = [None] * energy.n if energy.h_error is None else energy.h_error.tolist()
    rows = [
        (i, kind, plus_minus(value, error, ".4g"))
        for i, (kind, value, error) in enumerate(zip(kinds, h, errors, strict=True))
    ]
    ticks = [(f"{t:.3g}", scale(t)) for t in scale.ticks(4)]
    return {
        "bars": bars,
        "ticks": ticks,
        "log": scale.log,
        "words": words,
        "rows": rows,
    }


def unmeasured(energy: Hamiltonian) -> Bools:
    """Return (N, N), true at pairs that a search never removed together; their J is 0."""
    unknown: Bools = (energy.J == 0) & ("search" in energy.meta)
    np.fill_diagonal(unknown, False)
    return unknown


def draw_couplings(energy: Hamiltonian) -> dict[str, Any]:
    """Draw the couplings J_ij as a heat map.

    Returns:
        ``cells``, rows of pairs: CSS class (``p`` above 0, ``d`` the diagonal, ``u`` unmeasured,
        else ``n``) and opacity; ``hatch``, an SVG path over the unmeasured cells; ``full``, the |J|
        from which on the colour is full; ``beyond``, the number of pairs above it; ``legend``,
        values along the colour bar with their opacity; ``strongest``, the measured pairs of largest
        |J|, at most 200, as (i, j, text); ``words``, a description.
    """
    coupling = energy.J
    errors = energy.J_error
    unknown = unmeasured(energy)
    rows, columns = np.nonzero(np.triu(~unknown, 1))
    values = coupling[rows, columns]
    full = float(np.quantile(np.abs(values), SATURATION)) if len(values) else 0.0
    full = full or float(np.abs(values).max(initial=0.0)) or 1.0

    def opacity(found: Floats) -> Floats:
        return np.minimum(1.0, (np.abs(found) / full) ** ROOT)

    kinds = np.where(coupling > 0, "p", "n")
    kinds[unknown] = "u"
    np.fill_diagonal(kinds, "d")
    shades = opacity(coupling).tolist()
    strongest = []
    for k in np.argsort(-np.abs(values), kind="stable")[:200]:
        i = int(rows[k])
        j = int(columns[k])
        error = None if errors is None else float(errors[i, j])
        strongest.append((i, j, plus_minus(float(values[k]), error, ".3g")))
    words = (
        f"{int((values < 0).sum())} of {len(values)} pairs cost less together than apart (J below "
        f"0), {int((values > 0).sum())} cost more."
    )
    if missing := int(unknown.sum()) // 2:
        words += f" {missing} other pairs were never removed together: not measured."
    along = np.linspace(-full, full, 25)
    return {
        "cells": [
            list(zip(*row, strict=True))
            for row in zip(kinds.tolist(), shades, strict=True)
        ],
        "hatch": "".join(f"M{j} {i + 1}l1-1" for i, j in np.argwhere(unknown).tolist()),
        "full": full,
        "beyond": int((np.abs(values) > full).sum()),
        "legend": list(zip(along.tolist(), opacity(along).tolist(), strict=True)),
        "strongest": strongest,
        "words": words,
    }


# Charts -------------------------------------------------------------------------------

MOST_MARKS = 200
"""Maximum number of marked losses of a training; the line goes through all losses."""


def scatter_figure(files: RunFiles, name: str, states: Book) -> Figure:
    """Plot one energy against the measured KL of candidates and random states.

    Args:
        name: name of the energy, which is in `RunFiles.energies` and `RunFiles.judged`.
    """
    energy = files.energies[name]
    found = files.judged[name].kl
    both = [*states.of("random"), *states.of("candidate")]
    measured = [(s, s.kl) for s in both if s.kl is not None]
    energies = energy.energies(
        states_of(energy.n, (s.removed for s, _ in measured))
    ).tolist()
    shown = [(s, kl, e) for (s, kl), e in zip(measured, energies, strict=True)]
    ends = [end for _, kl, _ in shown for end in (kl.low, kl.high)]
    plot = Plot(
        x_span(energies, log=True),
        y_span(ends, log=True),
        f"energy {name}, {energy.unit}",
        f"KL ({CUT_RANKING}), nats/token",
    )
    for state, kl, value in sorted(shown, key=lambda t: t[0].chosen):
        random = state.kind == "random"
        plot.mark(
            value,
            kl.figure,
            state.tip(value, energy.unit, "energy" if name == files.energy else name),
            "chosen" if state.chosen else "random" if random else "measured",
            shape="ring" if random else "dot",
            error=kl.error,
            state=state.number,
        )
    return Figure(
        f"scatter-{name}",
        f"{name} against measured loss",
        sentence("ranks_words", found),
        plot,
        f"Energy {name} against measured KL.",
        ("state", f"energy, {energy.unit}", "KL, nats/token", "blocks removed"),
        [
            (s.name, f"{e:.5g}", kl.text(), join_blocks(s.removed))
            for s, kl, e in sorted(shown, key=lambda t: t[2])
        ],
        [
            ("measured", "low-energy candidates"),
            ("random", "random states"),
            ("chosen", "chosen state"),
        ],
    )


def healing_figure(healing: HealingFile) -> Figure:
    """Plot the training loss of a healing over its tokens."""
    steps = healing.steps
    title = "Loss while healing"
    if not steps:
        return Figure("healing", title, "No training: the record holds no losses.")
    losses = [s.loss for s in steps]
    axes = x_span([s.tokens for s in steps], zero=True), y_span(losses, log=True)
    plot = Plot(*axes, "tokens of training", "training loss")
    plot.line([(s.tokens, s.loss) for s in steps], "healed")
    for s in steps[:: -(-len(steps) // MOST_MARKS)]:
        tip = f"step {s.step}\n{s.tokens} tokens\nloss {s.loss:.4f}"
        plot.mark(s.tokens, s.loss, tip, "healed")
    rows = [(str(s.step), str(s.tokens), f"{s.loss:.5f}") for s in steps]
    columns = ("step", "tokens", "loss")
    words = f"The lowest of {len(losses)} is {min(losses):.4f}."
    return Figure("healing", title, words, plot, "Training loss.", columns, rows)


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of a trade-off figure: the kept share of a cost, or the decode speed.

    Attributes:
        key: HTML id of the figure.
        title: heading of the figure.
        label: label of the axis.
        sign: unit that follows a figure.
        whole: position of the original.
        cost: block cost whose kept share is the axis; empty for the measured decode speed.
    """

    key: str
    title: str
    label: str
    sign: str
    whole: float
    cost: str = ""

    def total(self, files: RunFiles) -> float:
        """Return the cost of the whole model; 0 if it has no such cost."""
        if self.cost == "parameters":
            return files.run.blocks.total_parameters
        return float(sum(getattr(b, self.cost) for b in files.blocks))

    def place(self, files: RunFiles) -> float | None:
        """Return the position of a removal on the axis, or None if it was not measured."""
        best = files.best
        found = files.evaluation
        if best is None:
            return None
        if self.cost:
            gone = sum(getattr(files.blocks[i], self.cost) for i in best.removed)
            return 100 * (1 - gone / self.total(files)) if self.total(files) else None
        speeds = [] if found is None else [found.before, found.after]
        rates = [side.decode_tokens_per_second for side in speeds]
        return (
            rates[1] / rates[0] if len(rates) == 2 and rates[0] and rates[1] else None
        )

    def plot(self, points: Sequence[Point]) -> Plot:
        """Make an empty plot with axes that cover all points and the original."""
        return Plot(
            x_span([self.whole, *(p.at for p in points)]),
            y_span([0.0, *(p.loss.high for p in points)], zero=True),
            self.label,
            f"KL ({CUT_RANKING}), nats/token",
        )


AXES = (
    Axis(
        "pareto-parameters",
        "Parameters",
        "parameters kept, %",
        " %",
        100.0,
        "parameters",
    ),
    Axis(
        "pareto-cache",
        "KV cache",
        "KV cache kept, %",
        " %",
        100.0,
        "kv_bytes_per_token",
    ),
    Axis("pareto-speed", "Measured speed", "decode speed, × original", " ×", 1.0),
)


@dataclass(frozen=True)
class Point:
    """One removal in a trade-off figure.

    Attributes:
        at: position on the horizontal axis.
        loss: measured KL of the state, or the ground state's energy if no KL was measured.
        measured: whether ``loss`` is a measured KL.
        removal: files of the removal.
        removed: removed blocks.
    """

    at: float
    loss: Value
    measured: bool
    removal: RunFiles
    removed: list[int]


def points_of(files: RunFiles, axis: Axis) -> list[Point]:
    """Return the points of all removals of a run that have a position on the axis.

    A removal without a measured KL has its ground state's energy as its loss if that is in nats
    per token, and is left out otherwise.
    """
    points = []
    for removal in files.removals:
        at = axis.place(removal)
        best = removal.best
        if at is not None and isinstance(best, MeasuredState):
            points.append(Point(at, kl_of(best), True, removal, best.removed))
        elif at is not None and best is not None and files.comparable:
            points.append(Point(at, Value(best.energy), False, removal, best.removed))
    return points


def front(
    points: Sequence[tuple[float, float]], *, more: bool
) -> list[tuple[float, float]]:
    """Return the Pareto front from left to right: no other point has a better position and loss.

    Args:
        points: pairs of position and loss.
        more: whether a larger position is better (speed), else a smaller one (kept share).
    """
    best: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda p: (-p[0] if more else p[0], p[1])):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return sorted(best)


def trade_off_figure(files: RunFiles, axis: Axis) -> Figure:
    """Plot the KL of all removals of a run against an axis, with the Pareto front."""
    points = points_of(files, axis)
    if not points:
        return Figure(axis.key, axis.title, sentence("no_points", files, axis))
    plot = axis.plot(points)
    taken = [(axis.whole, 0.0), *((p.at, p.loss.figure) for p in points if p.measured)]
    plot.line(front(taken, more=not axis.cost), "front")
    plot.mark(axis.whole, 0.0, "the original model\nKL 0", "original", shape="diamond")
    rows = [("none", f"{axis.whole:.4g}{axis.sign}", "0", "the original", "")]
    legend = {"original": "original", "chosen": "this removal"}
    for point in points:
        name = point.removal.name
        at = f"{point.at:.4g}{axis.sign}"
        what = (
            "measured KL"
            if point.measured
            else "not measured; energy of the ground state"
        )
        own = point.removal.target == files.target
        kind = "chosen" if own else "measured" if point.measured else "random"
        tip = (
            f"remove {name}\n{axis.label.split(',')[0]}: {at}\n{what} {point.loss.text()} "
            "nats/token"
        )
        shape = "dot" if point.measured else "ring"
        plot.mark(
            point.at, point.loss.figure, tip, kind, shape=shape, error=point.loss.error
        )
        known = "measured" if point.measured else "energy only"
        rows.append((name, at, point.loss.text(), known, join_blocks(point.removed)))
        key = kind if point.measured else "random"
        legend.setdefault(
            key, {"measured": "other removals", "random": "energy only"}.get(key, "")
        )
    return Figure(
        axis.key,
        axis.title,
        f"The original and {len(points)} removal" + "s" * (len(points) > 1) + ".",
        plot,
        f"{axis.title} against KL.",
        (
            "removal",
            axis.label,
            f"KL ({CUT_RANKING}), nats/token",
            "how known",
            "blocks removed",
        ),
        rows,
        list(legend.items()),
    )
