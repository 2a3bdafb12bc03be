"""The charts of one run: spectrum, energy against measured loss, healing."""

from __future__ import annotations

from typing import Any

from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import states_of
from isingcut.report.fidelity import correlation_text
from isingcut.report.run_files import RunFiles
from isingcut.report.states import Book
from isingcut.report.svg import Figure, Plot, x_span, y_span
from isingcut.report.words import listed, proof_words, searched_words

MOST_MARKS = 200
"""Of a long training's losses so many are marked; the line goes through all."""


def spectrum_figure(files: RunFiles, states: Book) -> Figure:
    """Energy levels in their order, with the measured KL where both are in nats per token."""
    spectrum = files.spectrum
    if spectrum is None:
        return Figure("spectrum", "Spectrum", f"Not run. Type `isingcut solve {files.arguments}`.")
    unit = spectrum["unit"]
    levels = states.of("candidate")
    energies = [float(s["energy"]) for s in spectrum["states"]]
    losses = [(s, s.kl) for s in levels if s.kl is not None] if unit == "nats/token" else []
    ends = [end for _, kl in losses for end in (kl.low, kl.high)]
    plot = Plot(x_span([-0.5, len(levels) - 0.5]), y_span([*energies, *ends]))
    step = max(1, -(-len(levels) // 8))
    plot.axes(
        "state, by energy",
        f"{'energy and measured KL' if losses else 'energy'}, {unit}",
        x_ticks=range(0, len(levels), step),
    )
    for rank, (s, energy) in enumerate(zip(levels, energies, strict=True)):
        kind = "chosen" if s.chosen else "level"
        plot.mark(rank, energy, s.tip(s.energy, unit), kind, shape="level", state=s.number)
    for s, kl in losses:
        kind, tip = "chosen" if s.chosen else "measured", s.tip(s.energy, unit)
        plot.mark(s.number, kl.figure, tip, kind, error=kl.error, state=s.number)
    gap = f"; the first gap is {energies[1] - energies[0]:.3g}" if len(energies) > 1 else ""
    last = len(levels) - spectrum.get("searched", 0) - 1
    words = (
        f"The {last + 1} states, {proof_words(spectrum)}, reach from {energies[0]:.4g} to "
        f"{energies[last]:.4g} {unit}{gap}.{searched_words(spectrum)}"
    )
    return Figure(
        "spectrum",
        "Spectrum",
        words,
        plot.svg(f"Energy levels. {words}"),
        ("state", f"energy, {unit}", "above ground state", "measured KL", "blocks removed"),
        [
            (
                str(rank),
                f"{energy:.5g}",
                f"{energy - energies[0]:.3g}",
                "" if s.kl is None else s.kl.text(),
                listed(s.removed),
            )
            for rank, (s, energy) in enumerate(zip(levels, energies, strict=True))
        ],
        [
            ("level", "energy"),
            *([("measured", "measured KL ± 1 SE")] if losses else []),
            ("chosen", "chosen state"),
        ],
    )


def scatter_figure(
    name: str,
    energy: Hamiltonian,
    found: dict[str, Any],
    states: Book,
    *,
    main: bool,
    link: bool = True,
) -> Figure:
    """One energy against the measured KL of candidates and random states.

    Args:
        name: of the energy.
        energy: gives the states' energies.
        found: its fidelity on the KL.
        main: it is the energy that chose.
        link: a click on a state shows it.
    """
    both = [*states.of("random"), *states.of("candidate")]
    measured = [(s, s.kl) for s in both if s.kl is not None]
    energies = energy.energies(states_of(energy.n, (s.removed for s, _ in measured))).tolist()
    shown = [(s, kl, e) for (s, kl), e in zip(measured, energies, strict=True)]
    ends = [end for _, kl, _ in shown for end in (kl.low, kl.high)]
    plot = Plot(x_span(energies, log=True), y_span(ends, log=True))
    plot.axes(
        f"energy {name}, {energy.unit}" + (" (log)" if plot.x.log else ""),
        "measured KL, nats/token" + (" (log)" if plot.y.log else ""),
    )
    for state, kl, value in sorted(shown, key=lambda t: t[0].chosen):
        kind = "chosen" if state.chosen else "random" if state.kind == "random" else "measured"
        tip = state.tip(value, energy.unit, "energy" if main else name)
        plot.mark(
            value, kl.figure, tip, kind,
            shape="ring" if state.kind == "random" else "dot",
            error=kl.error, state=state.number if link else None,
        )  # fmt: skip
    words = (
        f"Spearman {correlation_text(found, 'spearman')}, Kendall "
        f"{correlation_text(found, 'kendall')} over n = {found['n']} states (95 % intervals)."
        if found["n"]
        else "How well it ranks was not measured."
    )
    return Figure(
        f"scatter-{name}",
        f"{name} against measured loss",
        words,
        plot.svg(f"Energy {name} against measured KL. {words}"),
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


def healing_figure(healing: dict[str, Any]) -> Figure:
    """The training loss of the cut model over the tokens it was healed with."""
    steps = [s for s in healing.get("steps") or [] if s.get("loss") is not None]
    if not steps:
        return Figure("healing", "Loss while healing", "No training: the record holds no losses.")
    by_tokens = all(s.get("tokens") is not None for s in steps)
    places = [float(s["tokens"] if by_tokens else s["step"]) for s in steps]
    losses = [float(s["loss"]) for s in steps]
    plot = Plot(x_span(places, zero=True), y_span(losses, log=True))
    unit = "tokens" if by_tokens else "steps"
    plot.axes(f"{unit} of training", "training loss" + (" (log)" if plot.y.log else ""))
    plot.line(list(zip(places, losses, strict=True)), "healed")
    every = -(-len(steps) // MOST_MARKS)
    for step, place, loss in list(zip(steps, places, losses, strict=True))[::every]:
        tip = f"step {step['step']}\n{place:.0f} {unit}\nloss {loss:.4f}"
        plot.mark(place, loss, tip, "healed")
    words = (
        f"From {losses[0]:.4f} at the first record to {losses[-1]:.4f} after {places[-1]:,.0f} "
        f"{unit}; the lowest is {min(losses):.4f}."
    )
    return Figure(
        "healing",
        "Loss while healing",
        words,
        plot.svg(f"Training loss. {words}"),
        ("step", "tokens", "loss"),
        [(str(s["step"]), f"{s.get('tokens', '')}", f"{float(s['loss']):.5f}") for s in steps],
    )
