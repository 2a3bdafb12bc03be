"""Figures over the block axis: the map of low-energy states, the fields h, the couplings J.

All three are stretched over the same columns of the page, so that one block stands in one line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import Floats
from isingcut.report.rows import plus_minus
from isingcut.report.run_files import RunFiles
from isingcut.report.states import Book, KnownState
from isingcut.report.svg import Scale, span, whisker

MAP_ROWS = 20
# A few couplings are many times the rest: colour is full at this quantile of |J|, and grows like
# a root below it, so that the pattern of the others can be seen.
SATURATION, ROOT = 0.95, 0.6


def map_rows(files: RunFiles, states: Book) -> tuple[list[tuple[KnownState, str]], Scale]:
    """The lowest states, the chosen one in any case, with their `dots`; the margin's scale."""
    candidates = states.of("candidate")
    shown = [s for k, s in enumerate(candidates) if k < MAP_ROWS or s.chosen] + states.of("named")
    scale = margin_scale(files, shown)
    return [(s, dots(s, scale, energies=files.comparable)) for s in shown], scale


def margin_scale(files: RunFiles, states: list[KnownState]) -> Scale:
    """The scale, in percent of the margin's width, of measured losses and comparable energies."""
    losses = [state.kl for state in states if state.kl is not None]
    values = [end for kl in losses for end in (kl.low, kl.high)]
    if files.comparable:
        values += [state.energy for state in states if state.energy is not None]
    return span(values, 2.0, 98.0)


def dots(state: KnownState, scale: Scale, *, energies: bool) -> str:
    """Where the marks of one state are in the margin: custom properties in percent."""
    style = []
    if energies and state.energy is not None:
        style.append(f"--e:{scale(state.energy)}%")
    if state.kl is not None:
        style.append(whisker(scale, state.kl.figure, state.kl.low, state.kl.high))
    return ";".join(style)


def block_ticks(n: int) -> list[int]:
    """Blocks whose numbers stand along the axis, at most nine."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if n <= 9 * s)
    return list(range(0, n, step))


class Fields(NamedTuple):
    """The bars of h.

    Attributes:
        bars: top and height of each, in percent.
        ticks: labels of the vertical axis, with their place from the top in percent.
        log: the axis is logarithmic.
        words: what they show.
        rows: block, kind and figure with its error.
    """

    bars: list[tuple[float, float]]
    ticks: list[tuple[str, float]]
    log: bool
    words: str
    rows: list[tuple[int, str, str]]


def fields_figure(energy: Hamiltonian, kinds: Sequence[str]) -> Fields:
    """The own terms h_i as bars: logarithmic where all are positive and differ much."""
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
    return Fields(bars, ticks, scale.log, words, rows)


class Couplings(NamedTuple):
    """The heat map of J.

    Attributes:
        cells: rows of a class and its opacity: ``p`` above 0, ``n`` below, ``d`` the diagonal.
        full: |J| from which on the colour is full.
        beyond: pairs whose |J| is above it.
        legend: values along the colour bar with their opacity.
        strongest: pairs (i, j, text) of largest |J|, both signs.
        words: what it shows.
    """

    cells: list[list[tuple[str, float]]]
    full: float
    beyond: int
    legend: list[tuple[float, float]]
    strongest: list[tuple[int, int, str]]
    words: str


def couplings_figure(energy: Hamiltonian) -> Couplings:
    """The couplings J_ij."""
    n, coupling, errors = energy.n, energy.J, energy.J_error
    rows, columns = np.triu_indices(n, 1)
    values = coupling[rows, columns]
    full = float(np.quantile(np.abs(values), SATURATION)) if len(values) else 0.0
    full = full or float(np.abs(values).max(initial=0.0)) or 1.0

    def opacity(found: Floats) -> Floats:
        return np.minimum(1.0, (np.abs(found) / full) ** ROOT)

    kinds = np.where(coupling > 0, "p", "n")
    np.fill_diagonal(kinds, "d")
    shades = opacity(coupling).tolist()
    strongest = []
    for k in np.argsort(-np.abs(values), kind="stable")[:200]:
        i, j = int(rows[k]), int(columns[k])
        error = None if errors is None else float(errors[i, j])
        strongest.append((i, j, plus_minus(float(values[k]), error, ".3g")))
    words = (
        f"{int((values < 0).sum())} of {len(values)} pairs cost less together than apart (J below "
        f"0), {int((values > 0).sum())} cost more."
    )
    along = np.linspace(-full, full, 25)
    return Couplings(
        [list(zip(*row, strict=True)) for row in zip(kinds.tolist(), shades, strict=True)],
        full,
        int((np.abs(values) > full).sum()),
        list(zip(along.tolist(), opacity(along).tolist(), strict=True)),
        strongest,
        words,
    )
