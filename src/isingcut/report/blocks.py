"""Figures over the block axis: the map of low-energy states, the fields h, the couplings J.

All three are stretched over the same columns of the page, so that one block stands in one line.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

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
    return [(s, dots(s, scale, energies=_comparable(files))) for s in shown], scale


def margin_scale(files: RunFiles, states: list[KnownState]) -> Scale:
    """The scale, in percent of the margin's width, of measured losses and comparable energies."""
    losses = [state.kl for state in states if state.kl is not None]
    values = [end for kl in losses for end in (kl.low, kl.high)]
    if _comparable(files):
        values += [state.energy for state in states if state.energy is not None]
    return span(values, 2.0, 98.0)


def _comparable(files: RunFiles) -> bool:
    return files.hamiltonian is not None and files.hamiltonian.unit == "nats/token"


def dots(state: KnownState, scale: Scale, *, energies: bool) -> str:
    """Where the marks of one state are in the margin: custom properties in percent."""
    style = []
    if energies and state.energy is not None:
        style.append(f"--e:{scale(state.energy)}%")
    if state.kl is not None:
        style.append(whisker(scale, state.kl.figure, state.kl.low, state.kl.high))
    return ";".join(style)


def strip(n: int, removed: tuple[int, ...] | list[int]) -> Markup:
    """One row of N cells, those of removed blocks filled."""
    gone = set(removed)
    cells = "".join(f'<rect x="{i}.07" class="{"r" if i in gone else "k"}"/>' for i in range(n))
    return Markup(
        f'<svg class="strip" viewBox="0 0 {n} 1" preserveAspectRatio="none" aria-hidden="true">'
        f"{cells}</svg>"
    )


def block_ticks(n: int) -> list[int]:
    """Blocks whose numbers stand along the axis, at most nine."""
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100) if n <= 9 * s)
    return list(range(0, n, step))


@dataclass(frozen=True)
class Fields:
    """The bars of h.

    Attributes:
        svg: N bars.
        ticks: labels of the vertical axis, with their place from the top in percent.
        log: the axis is logarithmic.
        words: what they show.
    """

    svg: Markup
    ticks: list[tuple[str, float]]
    log: bool
    words: str


def fields_figure(energy: Hamiltonian) -> Fields:
    """The own terms h_i as bars: logarithmic where all are positive and differ much."""
    h = energy.h
    scale = span([float(v) for v in h], 96.0, 6.0, zero=True)
    wide = span([float(v) for v in h], 96.0, 6.0, log=True)
    scale = wide if wide.log else scale
    base = 98.0 if scale.log else scale(0.0)
    bars = []
    for i, value in enumerate(h):
        top, foot = sorted((scale(float(value)), base))
        bars.append(
            f'<rect x="{i}.15" width=".7" y="{top:.2f}" height="{max(foot - top, 0.6):.2f}"/>'
        )
    order = np.argsort(h)
    words = (
        f"Costliest alone: {_named(h, order[::-1][:3])}; cheapest: {_named(h, order[:3])} "
        f"({energy.unit})."
    )
    svg = Markup(
        f'<svg class="fields" viewBox="0 0 {energy.n} 100" preserveAspectRatio="none" '
        f'role="application" aria-roledescription="bars" tabindex="0" data-axis="h" '
        f'aria-label="Cost h of removing each block alone. {words} Arrow keys move through the '
        f'blocks.">{"".join(bars)}<rect class="cursor" width="1" height="100"/></svg>'
    )
    return Fields(svg, [(f"{t:.3g}", scale(t)) for t in scale.ticks(4)], scale.log, words)


def _named(h: Floats, which: npt.NDArray[np.intp]) -> str:
    return ", ".join(f"block {int(i)} ({h[int(i)]:.3g})" for i in which)


@dataclass(frozen=True)
class Couplings:
    """The heat map of J.

    Attributes:
        svg: N x N cells.
        full: |J| from which on the colour is full.
        beyond: pairs whose |J| is above it.
        legend: values along the colour bar with their opacity.
        strongest: pairs (i, j, text) of largest |J|, both signs.
        words: what it shows.
    """

    svg: Markup
    full: float
    beyond: int
    legend: list[tuple[float, float]]
    strongest: list[tuple[int, int, str]]
    words: str


def couplings_figure(energy: Hamiltonian, removed: list[int] | None) -> Couplings:
    """The couplings J_ij; pairs among the removed blocks are outlined."""
    n, coupling = energy.n, energy.J
    rows, columns = np.triu_indices(n, 1)
    values = coupling[rows, columns]
    full = float(np.quantile(np.abs(values), SATURATION)) if len(values) else 0.0
    full = full or float(np.abs(values).max(initial=0.0)) or 1.0

    def opacity(value: float) -> float:
        return float(min(1.0, (abs(value) / full) ** ROOT))

    cells = []
    for i in range(n):
        row = "".join(
            f'<rect x="{j}" class="{"p" if coupling[i, j] > 0 else "n"}" '
            f'fill-opacity="{opacity(coupling[i, j]):.2f}"/>'
            if i != j
            else f'<rect x="{j}" class="d"/>'
            for j in range(n)
        )
        cells.append(f'<g transform="translate(0 {i})">{row}</g>')
    picks = "".join(
        f'<rect class="pick" x="{j}" y="{i}"/>'
        for i in removed or []
        for j in removed or []
        if i != j
    )
    order = np.argsort(-np.abs(values), kind="stable")[:200]
    strongest = []
    for k in order:
        i, j = int(rows[k]), int(columns[k])
        error = None if energy.J_error is None else float(energy.J_error[i, j])
        strongest.append((i, j, plus_minus(float(values[k]), error, ".3g")))
    below = int((values < 0).sum())
    words = (
        f"{below} of {len(values)} pairs cost less together than apart (J below 0), "
        f"{int((values > 0).sum())} cost more."
    )
    svg = Markup(
        f'<svg class="heat" viewBox="0 0 {n} {n}" preserveAspectRatio="none" role="application" '
        f'style="--pick:{1.6 if n <= 48 else 0.8}px" '
        f'aria-roledescription="heat map" tabindex="0" data-axis="J" aria-label="Couplings J '
        f'between {n} blocks. {words} Arrow keys move through the cells.">'
        f'{"".join(cells)}<g class="picks">{picks}</g>'
        f'<rect class="cursor" width="1" height="{n}"/>'
        f'<rect class="cursor-row" width="{n}" height="1"/></svg>'
    )
    legend = [(v, opacity(v)) for v in np.linspace(-full, full, 25).tolist()]
    beyond = int((np.abs(values) > full).sum())
    return Couplings(svg, full, beyond, legend, strongest, words)
