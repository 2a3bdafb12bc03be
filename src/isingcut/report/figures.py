"""The charts of one run: spectrum, energy against measured loss, healing, trade-offs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from isingcut.files.documents import HealingFile, MeasuredState
from isingcut.ising.states import states_of
from isingcut.report.rows import CUT_RANKING, Value, kl_of
from isingcut.report.run_files import RunFiles
from isingcut.report.states import Book
from isingcut.report.svg import Figure, Plot, x_span, y_span
from isingcut.report.words import listed, sentence

MOST_MARKS = 200
"""Of a long training's losses so many are marked; the line goes through all."""


def spectrum_figure(files: RunFiles, states: Book) -> Figure:
    """Energy levels in their order, with the measured KL where both are in nats per token."""
    spectrum = files.spectrum
    if spectrum is None:
        return Figure("spectrum", "Spectrum", f"Not run. Type `isingcut solve {files.arguments}`.")
    unit = spectrum.unit
    levels = list(enumerate(states.of("candidate")))
    energies = [s.energy for s in spectrum.states]
    losses = [(k, s, s.kl) for k, s in levels if s.kl is not None] if unit == "nats/token" else []
    ends = [end for *_, kl in losses for end in (kl.low, kl.high)]
    plot = Plot(
        x_span([-0.5, len(levels) - 0.5]),
        y_span([*energies, *ends]),
        "state, by energy",
        f"{'energy and measured KL' if losses else 'energy'}, {unit}",
        range(0, len(levels), max(1, -(-len(levels) // 8))),
    )
    for k, s in levels:
        kind = "chosen" if s.chosen else "level"
        plot.mark(k, energies[k], s.tip(s.energy, unit), kind, shape="level", state=s.number)
    for k, s, kl in losses:
        kind = "chosen" if s.chosen else "measured"
        plot.mark(k, kl.figure, s.tip(s.energy, unit), kind, error=kl.error, state=s.number)
    rows = [
        (
            str(k),
            f"{energies[k]:.5g}",
            f"{energies[k] - energies[0]:.3g}",
            "" if s.kl is None else s.kl.text(),
            listed(s.removed),
        )
        for k, s in levels
    ]
    legend = [("level", "energy"), ("measured", "measured KL ± 1 SE"), ("chosen", "chosen state")]
    return Figure(
        "spectrum",
        "Spectrum",
        sentence("levels_words", spectrum),
        plot,
        "Energy levels.",
        ("state", f"energy, {unit}", "above ground state", "measured KL", "blocks removed"),
        rows,
        legend if losses else [legend[0], legend[2]],
    )


def scatter_figure(files: RunFiles, name: str, states: Book, *, link: bool = True) -> Figure:
    """One energy against the measured KL of candidates and random states.

    Args:
        name: of the energy, which is measured and judged.
        link: a click on a state shows it.
    """
    energy, found = files.energies[name], files.judged[name].kl
    both = [*states.of("random"), *states.of("candidate")]
    measured = [(s, s.kl) for s in both if s.kl is not None]
    energies = energy.energies(states_of(energy.n, (s.removed for s, _ in measured))).tolist()
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
            state=state.number if link else None,
        )
    return Figure(
        f"scatter-{name}",
        f"{name} against measured loss",
        sentence("ranks_words", found),
        plot,
        f"Energy {name} against measured KL.",
        ("state", f"energy, {energy.unit}", "KL, nats/token", "blocks removed"),
        [
            (s.name, f"{e:.5g}", kl.text(), listed(s.removed))
            for s, kl, e in sorted(shown, key=lambda t: t[2])
        ],
        [
            ("measured", "low-energy candidates"),
            ("random", "random states"),
            ("chosen", "chosen state"),
        ],
    )


def healing_figure(healing: HealingFile) -> Figure:
    """The training loss of the cut model over the tokens it was healed with."""
    steps, title = healing.steps, "Loss while healing"
    if not steps:
        return Figure("healing", title, "No training: the record holds no losses.")
    losses = [s.loss for s in steps]
    axes = x_span([s.tokens for s in steps], zero=True), y_span(losses, log=True)
    plot = Plot(*axes, "tokens of training", "training loss")
    plot.line([(s.tokens, s.loss) for s in steps], "healed")
    for s in steps[:: -(-len(steps) // MOST_MARKS)]:
        tip = f"step {s.step}\n{s.tokens} tokens\nloss {s.loss:.4f}"
        plot.mark(s.tokens, s.loss, tip, "healed")
    words = sentence("training_words", steps)
    rows = [(str(s.step), str(s.tokens), f"{s.loss:.5f}") for s in steps]
    columns = ("step", "tokens", "loss")
    return Figure("healing", title, words, plot, "Training loss.", columns, rows)


@dataclass(frozen=True)
class Axis:
    """What quality is traded for.

    Attributes:
        key: of the figure.
        title: of the figure.
        label: of the axis.
        sign: after a figure.
        whole: where the original is.
        cost: of a block, whose kept share is the axis; without one it is the speed measured.
    """

    key: str
    title: str
    label: str
    sign: str
    whole: float
    cost: str = ""

    def total(self, files: RunFiles) -> float:
        """The cost of the whole model; 0 where it has none."""
        if self.cost == "parameters":
            return files.run.blocks.total_parameters
        return float(sum(getattr(b, self.cost) for b in files.blocks))

    def place(self, files: RunFiles) -> float | None:
        """Where a removal is; None where that was not measured."""
        best, found = files.best, files.evaluation
        if best is None:
            return None
        if self.cost:
            gone = sum(getattr(files.blocks[i], self.cost) for i in best.removed)
            return 100 * (1 - gone / self.total(files)) if self.total(files) else None
        speeds = [] if found is None else [found.before, found.after]
        rates = [side.decode_tokens_per_second for side in speeds]
        return rates[1] / rates[0] if len(rates) == 2 and rates[0] and rates[1] else None

    def plot(self, points: Sequence[Point]) -> Plot:
        """Empty axes over all points and the original."""
        return Plot(
            x_span([self.whole, *(p.at for p in points)]),
            y_span([0.0, *(p.loss.high for p in points)], zero=True),
            self.label,
            f"KL ({CUT_RANKING}), nats/token",
        )


AXES = (
    Axis("pareto-parameters", "Parameters", "parameters kept, %", " %", 100.0, "parameters"),
    Axis("pareto-cache", "KV cache", "KV cache kept, %", " %", 100.0, "kv_bytes_per_token"),
    Axis("pareto-speed", "Measured speed", "decode speed, × original", " ×", 1.0),
)


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
    removal: RunFiles
    removed: list[int]


def points_of(files: RunFiles, axis: Axis) -> list[Point]:
    """All removals of a run that can be placed.

    A removal that is not measured is placed at its ground state's energy where that is in nats
    per token, and left out otherwise.
    """
    points = []
    for removal in files.removals:
        at, best = axis.place(removal), removal.best
        if at is not None and isinstance(best, MeasuredState):
            points.append(Point(at, kl_of(best), True, removal, best.removed))
        elif at is not None and best is not None and files.comparable:
            points.append(Point(at, Value(best.energy), False, removal, best.removed))
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
    if axis.cost and not axis.total(files):
        return Figure(axis.key, axis.title, sentence("no_cost"))
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
        name, at = point.removal.name, f"{point.at:.4g}{axis.sign}"
        what = "measured KL" if point.measured else "not measured; energy of the ground state"
        own = point.removal.target == files.target
        kind = "chosen" if own else "measured" if point.measured else "random"
        tip = (
            f"remove {name}\n{axis.label.split(',')[0]}: {at}\n{what} {point.loss.text()} "
            "nats/token"
        )
        shape = "dot" if point.measured else "ring"
        plot.mark(point.at, point.loss.figure, tip, kind, shape=shape, error=point.loss.error)
        known = "measured" if point.measured else "energy only"
        rows.append((name, at, point.loss.text(), known, listed(point.removed)))
        key = kind if point.measured else "random"
        legend.setdefault(key, {"measured": "other removals", "random": "energy only"}.get(key, ""))
    return Figure(
        axis.key,
        axis.title,
        sentence("removals_words", points),
        plot,
        f"{axis.title} against KL.",
        ("removal", axis.label, f"KL ({CUT_RANKING}), nats/token", "how known", "blocks removed"),
        rows,
        list(legend.items()),
    )
