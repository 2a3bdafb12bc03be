"""Several runs on one page: two models, two energies, two calibration texts.

What differs between the runs is found and said first; a loss is only called comparable where it
was measured on the same tokens of the same model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from isingcut.report.blocks import block_ticks, strip
from isingcut.report.figures import scatter_figure
from isingcut.report.page import page
from isingcut.report.run_files import RunFiles
from isingcut.report.sides import Run, comparison_warnings, differences, named, numbers_of, overview
from isingcut.report.states import book
from isingcut.report.svg import Figure, Plot, Scale, span, x_span, y_span
from isingcut.report.tradeoff import (
    Point,
    kept_cache,
    kept_parameters,
    speed_ratio,
    trade_off_points,
)
from isingcut.report.words import correlation_text, plus_minus


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
    losses = [r for r in runs if r.loss is not None]
    html = page(
        "compare.html.j2",
        title=f"{numbers_of(len(runs))} compared",
        runs=runs,
        differences=differences(runs),
        warnings=warnings,
        table=overview(runs),
        fidelity=_fidelity(runs),
        fidelity_scale=Scale(-1.0, 1.0, 0.0, 100.0),
        losses=_losses(losses),
        loss_scale=_loss_scale(losses),
        strips=[
            (r, strip(len(r.files.blocks), r.files.removed), block_ticks(len(r.files.blocks)))
            for r in runs
            if r.files.removed is not None
        ],
        trade_offs=[
            _trade_off(runs, "parameters", "Parameters", "parameters kept, %", kept_parameters),
            _trade_off(runs, "cache", "KV cache", "KV cache kept, %", kept_cache),
            _trade_off(
                runs, "speed", "Measured speed", "decode speed, × original", lambda _: speed_ratio
            ),
        ],
        scatters=[f for k, r in enumerate(losses) for f in _scatter(f"scatter-run-{k}", r)],
        crossed=_crossed(losses),
        data={"n": 0, "kinds": [], "parameters": [], "states": []},
    )
    return html, warnings


def _fidelity(runs: Sequence[Run]) -> list[Interval]:
    """Spearman of every energy that a run measured, with its interval."""
    scale = Scale(-1.0, 1.0, 0.0, 100.0)
    rows = []
    for run in runs:
        for energy, found in run.files.judged.items():
            figures = found["kl"]
            style = ""
            if figures["spearman"] is not None:
                style = _style(
                    scale, figures["spearman"], figures["spearman_low"], figures["spearman_high"]
                )
            text = correlation_text(figures, "spearman")
            rows.append(Interval(run.name, run.tone, text, style, energy))
    return rows


def _loss_scale(runs: Sequence[Run]) -> Scale:
    ends = [
        value
        for r in runs
        if r.loss is not None
        for value in (r.loss["kl"] - (r.loss["kl_se"] or 0), r.loss["kl"] + (r.loss["kl_se"] or 0))
    ]
    return span(ends, 0.0, 100.0, zero=True)


def _losses(runs: Sequence[Run]) -> list[Interval]:
    scale = _loss_scale(runs)
    rows = []
    for run in runs:
        assert run.loss is not None
        kl, error = float(run.loss["kl"]), run.loss["kl_se"]
        style = _style(scale, kl, kl - (error or 0.0), kl + (error or 0.0))
        removed = f"{len(run.loss['removed'])} of {len(run.files.blocks)} blocks"
        rows.append(Interval(run.name, run.tone, plus_minus(kl, error), style, removed))
    return rows


def _style(scale: Scale, value: float, low: float | None, high: float | None) -> str:
    a, b = (scale(value if v is None else v) for v in (low, high))
    return f"--k:{scale(value)}%;--a:{a}%;--w:{round(b - a, 2)}%"


def _trade_off(
    runs: Sequence[Run], key: str, title: str, label: str, place_of: Callable[[RunFiles], Any]
) -> Figure:
    found: list[tuple[Run, list[Point]]] = []
    for run in runs:
        place = place_of(run.files)
        points = [] if place is None else trade_off_points(run.files, place)
        found.append((run, sorted((p for p in points if p.measured), key=lambda p: p.at)))
    if not any(points for _, points in found):
        return Figure(key, title, "No run has measured this.")
    whole = 1.0 if key == "speed" else 100.0
    flat = [p for _, points in found for p in points]
    plot = Plot(
        x_span([whole, *(p.at for p in flat)]),
        y_span([0.0, *(p.loss + (p.error or 0.0) for p in flat)], zero=True),
    )
    plot.axes(label, "KL to the original, nats/token")
    for run, points in found:
        ends = [(whole, 0.0), *((p.at, p.loss) for p in points)]
        plot.line(sorted(ends), f"tone-{run.tone}")
    plot.mark(whole, 0.0, "the original\nKL 0", "original", shape="diamond")
    rows = []
    for run, points in found:
        for point in points:
            loss = plus_minus(point.loss, point.error)
            tip = f"{run.name}\nremove {point.removal.name}\n{label}: {point.at:.4g}\nKL {loss}"
            plot.mark(point.at, point.loss, tip, f"tone-{run.tone}", error=point.error)
            rows.append((run.name, point.removal.name, f"{point.at:.4g}", loss))
    words = f"{len(flat)} measured removals of {numbers_of(len(runs))}."
    return Figure(
        f"pareto-{key}",
        title,
        words,
        plot.svg(f"{title} against KL. {words}"),
        ("run", "removal", label, "KL, nats/token"),
        rows,
        [(f"tone-{run.tone}", run.name) for run, points in found if points],
    )


def _scatter(key: str, run: Run) -> list[Figure]:
    energy = run.files.hamiltonian
    if energy is None:
        return []
    found = run.files.judged[run.files.energy]["kl"]
    figure = scatter_figure(run.files.energy, energy, found, book(run.files), main=True, link=False)
    return [
        Figure(
            key, f"{run.name}: {figure.title}", figure.words, figure.svg,
            figure.columns, figure.rows, figure.legend,
        )
    ]  # fmt: skip


def _crossed(runs: Sequence[Run]) -> list[tuple[Run, list[str]]]:
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
            x = np.zeros((len(states), energy.n), dtype=bool)
            for row, state in zip(x, states, strict=True):
                row[state["removed"]] = True
            cells.append(_spearman(energy.energies(x), np.array([s["kl"] for s in states])))
        rows.append((run, cells))
    return rows


def _spearman(energies: Any, losses: Any) -> str:
    from scipy.stats import spearmanr

    if len(energies) < 3 or np.ptp(energies) == 0 or np.ptp(losses) == 0:
        return "undefined"
    return f"{float(spearmanr(energies, losses).statistic):.2f}"
