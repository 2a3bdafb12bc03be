"""Several runs on one page: two models, two energies, two calibration texts.

What differs between the runs is found and said first; a loss is only called comparable where it
was measured on the same tokens of the same model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from isingcut.files.documents import ChosenState
from isingcut.ising.states import Floats, states_of
from isingcut.report.blocks import block_ticks
from isingcut.report.figures import AXES, Axis, points_of, scatter_figure
from isingcut.report.render import render_page
from isingcut.report.rows import CUT_RANKING, kl_of
from isingcut.report.run_files import RunFiles
from isingcut.report.states import number_states
from isingcut.report.svg import Figure, Scale, span, whisker
from isingcut.report.words import paragraphs


@dataclass(frozen=True)
class Side:
    """One run of a comparison.

    Attributes:
        files: its files.
        name: its folder, with the folder above where names are the same.
        tone: number of its colour.
    """

    files: RunFiles
    name: str
    tone: int

    @property
    def text(self) -> str | None:
        """SHA-256 of its calibration tokens; equal where losses were measured on the same text."""
        return None if self.files.calibration is None else self.files.calibration.sha256

    @property
    def sha(self) -> str:
        """SHA-256 that identifies its model."""
        return self.files.run.provenance.model.sha256

    @property
    def loss(self) -> ChosenState | None:
        """The chosen state as the ranking measured it."""
        return None if self.files.candidates is None else self.files.candidates.chosen


def comparison_page(found: Sequence[RunFiles]) -> tuple[str, list[str]]:
    """The page of several runs, in the order given, and the warnings on it."""
    runs = _sides(found)
    warnings = paragraphs("comparison_warnings", runs)
    ranked = [r for r in runs if r.loss is not None]
    ends = [end for r in ranked if r.loss for end in (kl_of(r.loss).low, kl_of(r.loss).high)]
    html = render_page(
        "compare.html.j2",
        title=f"{len(runs)} run{'s' * (len(runs) != 1)} compared",
        runs=runs,
        differences=differences(runs),
        warnings=warnings,
        ranked=ranked,
        correlations=Scale(-1.0, 1.0, 0.0, 100.0),
        losses=span(ends, 0.0, 100.0, zero=True),
        whisker=whisker,
        block_ticks=block_ticks,
        trade_offs=[_trade_off(runs, axis) for axis in AXES],
        scatters=[f for k, r in enumerate(ranked) for f in _scatter(f"scatter-run-{k}", r)],
        crossed=_crossed(ranked),
        data={"n": 0, "kinds": [], "parameters": [], "states": []},
    )
    return html, warnings


def _sides(found: Sequence[RunFiles]) -> list[Side]:
    places = [f.target.resolve() for f in found]
    short = [p.name for p in places]
    long = [f"{p.parent.name}/{p.name}" for p in places]
    names = [s if short.count(s) == 1 else n for s, n in zip(short, long, strict=True)]
    names = [n if names.count(n) == 1 else f"{n} ({k + 1})" for k, n in enumerate(names)]
    return [Side(f, n, k % 6) for k, (f, n) in enumerate(zip(found, names, strict=True))]


def differences(runs: Sequence[Side]) -> list[tuple[str, list[str]]]:
    """Model, text and every option that is not the same in all runs."""
    texts = ["" if (c := r.files.calibration) is None else f"{c.source} " for r in runs]
    texts = [
        f"{t}(SHA-256 {(r.text or 'not there')[:8]})" for t, r in zip(texts, runs, strict=True)
    ]
    rows = [
        ("model", [r.files.model for r in runs], [r.sha for r in runs]),
        ("calibration text", texts, [str(r.text) for r in runs]),
    ]
    configs = [r.files.run.config.content() for r in runs]
    for key in dict.fromkeys(k for config in configs for k in config):
        values = [str(config.get(key, "")) for config in configs]
        if key not in ("model", "calibration"):
            rows.append((key.replace("_", " "), values, values))
    return [(name, shown) for name, shown, identity in rows if len(set(identity)) > 1]


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
    words = f"{len(flat)} measured removals of {len(runs)} run{'s' * (len(runs) != 1)}."
    return Figure(
        axis.key,
        axis.title,
        words,
        plot,
        f"{axis.title} against KL.",
        ("run", "removal", axis.label, f"KL ({CUT_RANKING}), nats/token"),
        rows,
        [(f"tone-{run.tone}", run.name) for run, points in found if points],
    )


def _scatter(key: str, run: Side) -> list[Figure]:
    if run.files.hamiltonian is None:
        return []
    states = number_states(run.files)
    figure = scatter_figure(run.files, run.files.energy, states, link=False)
    return [replace(figure, key=key, title=f"{run.name}: {figure.title}")]


def _crossed(runs: Sequence[Side]) -> list[tuple[Side, list[str]]]:
    """Every run's energy judged on the states that every run measured: Spearman with the KL.

    Only where all are of one model; an energy that also ranks the states measured on another
    text, or chosen by another energy, is no accident of its own.
    """
    if len(runs) < 2 or len({(r.sha, len(r.files.blocks)) for r in runs}) > 1:
        return []
    rankings = [r.files.candidates for r in runs]
    measured = [[*f.candidates, *f.random] for f in rankings if f is not None]
    rows = []
    for run in runs:
        energy = run.files.hamiltonian
        if energy is None:
            return []
        cells = []
        for states in measured:
            energies = energy.energies(states_of(energy.n, (s.removed for s in states)))
            cells.append(_spearman(energies, np.array([s.kl for s in states])))
        rows.append((run, cells))
    return rows


def _spearman(energies: Floats, losses: Floats) -> str:
    from scipy.stats import spearmanr

    if len(energies) < 3 or np.ptp(energies) == 0 or np.ptp(losses) == 0:
        return "undefined"
    return f"{float(spearmanr(energies, losses).statistic):.2f}"
