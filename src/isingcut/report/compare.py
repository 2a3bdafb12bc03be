"""Several runs on one page: two models, two energies, two calibration texts.

What differs between the runs is found and said first; a loss is only called comparable where it
was measured on the same tokens of the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from isingcut.ising.states import Floats, states_of
from isingcut.report.blocks import block_ticks, strip
from isingcut.report.fidelity import correlation_text
from isingcut.report.figures import scatter_figure
from isingcut.report.render import render_page
from isingcut.report.run_files import RunFiles
from isingcut.report.sides import (
    Side,
    comparison_warnings,
    differences,
    named,
    numbers_of,
    overview,
)
from isingcut.report.states import book, measured_kl
from isingcut.report.svg import Figure, Scale, span, whisker
from isingcut.report.tradeoff import AXES, Axis, points_of

_CORRELATIONS = Scale(-1.0, 1.0, 0.0, 100.0)


@dataclass(frozen=True)
class Interval:
    """A row of a dot plot: a figure with its interval."""

    name: str
    tone: int
    text: str
    style: str
    note: str = ""


def comparison_page(found: Sequence[RunFiles]) -> tuple[str, list[str]]:
    """The page of several runs, in the order given, and the warnings on it."""
    runs = named(found)
    warnings = comparison_warnings(runs)
    ranked = [r for r in runs if r.loss is not None]
    losses, loss_scale = _losses(ranked)
    html = render_page(
        "compare.html.j2",
        title=f"{numbers_of(len(runs))} compared",
        runs=runs,
        differences=differences(runs),
        warnings=warnings,
        table=overview(runs),
        fidelity=_fidelity(runs),
        fidelity_scale=_CORRELATIONS,
        losses=losses,
        loss_scale=loss_scale,
        strips=[
            (r, strip(len(r.files.blocks), r.files.removed), block_ticks(len(r.files.blocks)))
            for r in runs
            if r.files.removed is not None
        ],
        trade_offs=[_trade_off(runs, axis) for axis in AXES],
        scatters=[f for k, r in enumerate(ranked) for f in _scatter(f"scatter-run-{k}", r)],
        crossed=_crossed(ranked),
        data={"n": 0, "kinds": [], "parameters": [], "states": []},
    )
    return html, warnings


def _fidelity(runs: Sequence[Side]) -> list[Interval]:
    """Spearman of every energy that a run measured, with its interval."""
    rows = []
    for run in runs:
        for energy, found in run.files.judged.items():
            value, low, high = (found["kl"][f"spearman{end}"] for end in ("", "_low", "_high"))
            style = ""
            if value is not None:
                low, high = (value if end is None else end for end in (low, high))
                style = whisker(_CORRELATIONS, value, low, high)
            text = correlation_text(found["kl"], "spearman")
            rows.append(Interval(run.name, run.tone, text, style, energy))
    return rows


def _losses(runs: Sequence[Side]) -> tuple[list[Interval], Scale]:
    """The chosen states of the runs that were ranked, and the scale of their KL."""
    found = [(run, run.loss, measured_kl(run.loss)) for run in runs if run.loss is not None]
    scale = span([end for *_, kl in found for end in (kl.low, kl.high)], 0.0, 100.0, zero=True)
    rows = []
    for run, chosen, kl in found:
        removed = f"{len(chosen['removed'])} of {len(run.files.blocks)} blocks"
        style = whisker(scale, kl.figure, kl.low, kl.high)
        rows.append(Interval(run.name, run.tone, kl.text(), style, removed))
    return rows, scale


def _trade_off(runs: Sequence[Side], axis: Axis) -> Figure:
    """All measured removals of each run, joined to its original."""
    found = [
        (run, sorted((p for p in points_of(run.files, axis) if p.measured), key=lambda p: p.at))
        for run in runs
    ]
    flat = [point for _, points in found for point in points]
    if not flat:
        return Figure(axis.key, axis.title, "No run has measured this.")
    plot = axis.plot(flat)
    for run, points in found:
        ends = [(axis.whole, 0.0), *((p.at, p.loss.figure) for p in points)]
        plot.line(sorted(ends), f"tone-{run.tone}")
    plot.mark(axis.whole, 0.0, "the original\nKL 0", "original", shape="diamond")
    rows = []
    for run, points in found:
        for point in points:
            removal, at, loss = point.removal.name, f"{point.at:.4g}", point.loss
            tip = f"{run.name}\nremove {removal}\n{axis.label}: {at}\nKL {loss.text()}"
            plot.mark(point.at, loss.figure, tip, f"tone-{run.tone}", error=loss.error)
            rows.append((run.name, removal, at, loss.text()))
    words = f"{len(flat)} measured removals of {numbers_of(len(runs))}."
    return Figure(
        axis.key,
        axis.title,
        words,
        plot.svg(f"{axis.title} against KL. {words}"),
        ("run", "removal", axis.label, "KL, nats/token"),
        rows,
        [(f"tone-{run.tone}", run.name) for run, points in found if points],
    )


def _scatter(key: str, run: Side) -> list[Figure]:
    energy = run.files.hamiltonian
    if energy is None:
        return []
    found = run.files.judged[run.files.energy]["kl"]
    figure = scatter_figure(run.files.energy, energy, found, book(run.files), main=True, link=False)
    return [replace(figure, key=key, title=f"{run.name}: {figure.title}")]


def _crossed(runs: Sequence[Side]) -> list[tuple[Side, list[str]]]:
    """Every run's energy judged on the states that every run measured: Spearman with the KL.

    Only where all are of one model; an energy that also ranks the states measured on another
    text, or chosen by another energy, is no accident of its own.
    """
    if len(runs) < 2 or len({(r.sha, len(r.files.blocks)) for r in runs}) > 1:
        return []
    rows = []
    for run in runs:
        energy = run.files.hamiltonian
        if energy is None:
            return []
        cells = []
        for other in runs:
            found = other.files.candidates
            assert found is not None
            states = [*found["candidates"], *found["random"]]
            energies = energy.energies(states_of(energy.n, (s["removed"] for s in states)))
            cells.append(_spearman(energies, np.array([s["kl"] for s in states])))
        rows.append((run, cells))
    return rows


def _spearman(energies: Floats, losses: Floats) -> str:
    from scipy.stats import spearmanr

    if len(energies) < 3 or np.ptp(energies) == 0 or np.ptp(losses) == 0:
        return "undefined"
    return f"{float(spearmanr(energies, losses).statistic):.2f}"
