"""The figures of a report: the map of low-energy states, h, J and the charts.

The map, the fields h and the couplings J have the same columns on the page, so that a block is at
the same horizontal position in all three.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from isingcut.files.healings import HealingFile
from isingcut.files.states import MeasuredState
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Bools, states_of
from isingcut.report.plots import Figure, Plot, span, x_span, y_span
from isingcut.report.rows import CUT_RANKING, kl_of, plus_minus
from isingcut.report.run_files import RunFiles
from isingcut.report.states import ReportState
from isingcut.report.words import join_blocks, sentence

# The block axis -----------------------------------------------------------------------

MAP_ROWS = 20
# A few couplings are much larger than the rest. Colour is full from this quantile of |J| on and
# grows with this power of |J| below it, so that the smaller couplings are visible.
SATURATION = 0.95
ROOT = 0.6


def map_rows(states: Sequence[ReportState]) -> list[ReportState]:
    """Return the lowest states, the chosen one, and one named by hand."""
    lowest = [s for s in states if s.kind == "candidate"][:MAP_ROWS]
    kinds = ("candidate", "named")
    return [s for s in states if s in lowest or (s.chosen and s.kind in kinds)]


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
    scale = span(h, 96.0, 6.0, log=True, zero=True)
    base = 98.0 if scale.log else scale(0.0)
    ends = [sorted((scale(value), base)) for value in h]
    bars = [(top, max(foot - top, 0.6)) for top, foot in ends]
    named = [f"block {i} ({h[i]:.3g})" for i in np.argsort(h)]
    words = (
        f"Costliest alone: {', '.join(named[:-4:-1])}; cheapest: {', '.join(named[:3])} "
        f"({energy.unit})."
    )
    errors = [None] * energy.n if energy.h_error is None else energy.h_error
    texts = map(partial(plus_minus, form=".4g"), h, errors)
    return {
        "bars": bars,
        "ticks": [(f"{t:.3g}", scale(t)) for t in scale.ticks(4)],
        "log": scale.log,
        "words": words,
        "rows": list(zip(range(energy.n), kinds, texts, strict=True)),
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
        from which on the colour is full; ``beyond``, the number of pairs above it; ``strongest``,
        the measured pairs of largest |J|, at most 200, as (i, j, text); ``words``, a description.
    """
    coupling = energy.J
    unknown = unmeasured(energy)
    pairs = np.argwhere(np.triu(~unknown, 1))
    values = coupling[tuple(pairs.T)]
    sizes = np.abs(values)
    full = float(np.quantile(sizes, SATURATION)) if len(values) else 0.0
    full = full or float(sizes.max(initial=0.0)) or 1.0
    kinds = np.where(coupling > 0, "p", "n")
    kinds[unknown] = "u"
    np.fill_diagonal(kinds, "d")
    shades = np.minimum(1.0, (np.abs(coupling) / full) ** ROOT).tolist()
    strongest = []
    for i, j in pairs[np.argsort(-sizes, kind="stable")[:200]].tolist():
        error = None if energy.J_error is None else energy.J_error[i, j]
        strongest.append((i, j, plus_minus(coupling[i, j], error, ".3g")))
    words = (
        f"{(values < 0).sum()} of {len(values)} pairs cost less together than apart (J below "
        f"0), {(values > 0).sum()} cost more."
    )
    if missing := unknown.sum() // 2:
        words += f" {missing} other pairs were never removed together: not measured."
    return {
        "cells": [
            list(zip(*row, strict=True))
            for row in zip(kinds.tolist(), shades, strict=True)
        ],
        "hatch": "".join(f"M{j} {i + 1}l1-1" for i, j in np.argwhere(unknown)),
        "full": full,
        "beyond": int((sizes > full).sum()),
        "strongest": strongest,
        "words": words,
    }


# Charts -------------------------------------------------------------------------------

MOST_MARKS = 200
"""Maximum number of marked losses of a training; the line goes through all losses."""


def scatter_figure(files: RunFiles, name: str, states: Sequence[ReportState]) -> Figure:
    """Plot one energy against the measured KL of candidates and random states.

    Args:
        name: name of the energy, which is in `RunFiles.energies` and `RunFiles.judged`.
    """
    energy = files.energies[name]
    drawn = [s for s in states if s.kind in ("random", "candidate")]
    # The chosen state is drawn above all others.
    drawn.sort(key=lambda s: (s.chosen, s.kind == "candidate"))
    shown = [(s, s.kl) for s in drawn if s.kl is not None]
    drawn_states = states_of(energy.n, (s.removed for s, _ in shown))
    energies = energy.energies(drawn_states)
    plot = Plot(
        x_span(energies, log=True),
        y_span([end for _, kl in shown for end in (kl.low, kl.high)], log=True),
        f"energy {name}, {energy.unit}",
        f"KL ({CUT_RANKING}), nats/token",
    )
    legend = {
        "candidate": "low-energy candidates",
        "random": "random states",
        "chosen": "chosen state",
    }
    for (state, kl), value in zip(shown, energies, strict=True):
        plot.mark(
            value,
            kl.figure,
            state.tip(value, energy.unit, "energy" if name == files.energy else name),
            "chosen" if state.chosen else state.kind,
            error=kl.error,
            state=state.number,
        )
    title = f"{name} against measured loss"
    words = sentence("ranks_words", files.judged[name].kl)
    return Figure(f"scatter-{name}", title, words, plot, legend)


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
        plot.mark(
            s.tokens,
            s.loss,
            f"step {s.step}\n{s.tokens} tokens\nloss {s.loss:.4f}",
            "healed",
        )
    words = f"The lowest of {len(losses)} is {min(losses):.4f}."
    return Figure("healing", title, words, plot)


@dataclass(frozen=True)
class Axis:
    """The horizontal axis of a trade-off figure: the kept share of a cost, or the decode speed.

    Attributes:
        key: HTML id of the figure.
        title: heading of the figure.
        label: label of the axis.
        whole: position of the original.
        cost: block cost whose kept share is the axis; empty for the measured decode speed.
    """

    key: str
    title: str
    label: str
    whole: float
    cost: str = ""

    def total(self, files: RunFiles) -> float:
        """Return the cost of the whole model; 0 if it has no such cost."""
        if self.cost == "parameters":
            return files.run.blocks.total_parameters
        return float(sum(getattr(b, self.cost) for b in files.blocks))

    def place(self, files: RunFiles) -> float | None:
        """Return the position of a removal on the axis, or None if it was not measured."""
        if self.cost:
            total = self.total(files)
            return 100 * (1 - files.gone(self.cost) / total) if total else None
        speeds = (r.ratio for r in files.scores if r.key == "decode_tokens_per_second")
        return next((speed.figure for speed in speeds if speed), None)


AXES = (
    Axis("pareto-parameters", "Parameters", "parameters kept, %", 100.0, "parameters"),
    Axis("pareto-cache", "KV cache", "KV cache kept, %", 100.0, "kv_bytes_per_token"),
    Axis("pareto-speed", "Measured speed", "decode speed, × original", 1.0),
)


@dataclass(frozen=True)
class Group:
    """Removals of a trade-off figure that look alike.

    Attributes:
        kind: CSS class of their marks.
        name: their meaning in the legend.
        removals: the files of each.
        joined: whether a line joins them to the original.
    """

    kind: str
    name: str
    removals: Sequence[RunFiles]
    joined: bool = False


def trade_off_figure(axis: Axis, groups: Sequence[Group], absent: str) -> Figure:
    """Plot the KL of removals against an axis.

    It is that of the final models on unseen text if all were evaluated, else that of the cuts.

    Args:
        absent: the reason if no removal has a measured KL and a position on the axis.
    """
    final = all(f.evaluation for g in groups for f in g.removals if f.candidates)
    points = []
    for group in groups:
        for files in group.removals:
            at = axis.place(files)
            if at is not None and isinstance(files.best, MeasuredState):
                kl = kl_of((final and files.evaluation) or files.best)
                points.append((group, files, at, kl))
    if not points:
        return Figure(axis.key, axis.title, absent)
    plot = Plot(
        x_span([axis.whole, *(at for *_, at, _ in points)]),
        y_span([0.0, *(kl.high for *_, kl in points)], zero=True),
        axis.label,
        f"KL ({'final model, unseen text' if final else CUT_RANKING}), nats/token",
    )
    plot.mark(axis.whole, 0.0, "the original", "original")
    legend = {"original": "original"}
    for group in groups:
        own = [(at, kl.figure) for of, _, at, kl in points if of is group]
        if group.joined and own:
            plot.line(sorted([*own, (axis.whole, 0.0)]), group.kind)
    for group, files, at, kl in points:
        tip = (
            f"{group.name}: remove {files.name}\n{axis.label}: {at:.4g}\n"
            f"KL {kl.text()} nats/token\nwithout blocks {join_blocks(files.removed or ())}"
        )
        plot.mark(at, kl.figure, tip, group.kind, error=kl.error)
        legend[group.kind] = group.name
    words = f"The original and {len(points)} measured removal{'s'[: len(points) > 1]}."
    return Figure(axis.key, axis.title, words, plot, legend)
