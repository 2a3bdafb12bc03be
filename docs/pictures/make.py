"""Draw the pictures of the documentation: python docs/pictures/make.py [FOLDER]

The data come from formulas, from benchmarks/data (a measured Hamiltonian), from the results of the
studies and from data/ next to this file. The same versions of matplotlib and numpy give the same
bytes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import isingcut
from isingcut.ising import constraints

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "benchmarks" / "data"
STUDIES = HERE.parent.parent / "studies"
RESULTS = STUDIES / "healing" / "results"
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#8a8a8a"

mpl.use("Agg")
mpl.rcParams.update(
    {
        "svg.fonttype": "none",
        "svg.hashsalt": "isingcut",
        "font.family": "sans-serif",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
    }
)


def hamiltonian() -> isingcut.Hamiltonian:
    """Return SmolLM2-135M's measured pair energy, as committed."""
    data = json.loads((DATA / "smollm2-135m-pairwise.json").read_text(encoding="utf-8"))
    n = len(data["h"])
    J = np.zeros((n, n))
    J[np.triu_indices(n, 1)] = data["J_upper"]
    return isingcut.Hamiltonian(np.array(data["h"]), J + J.T, data["c"], data["unit"])


def lowest(energy: isingcut.Hamiltonian, m: int, k: int = 20) -> isingcut.Spectrum:
    problem = isingcut.Problem(energy, [constraints.count(energy.n, m)])
    return isingcut.solve(problem, "exact", k)


def removal() -> plt.Figure:
    """Draw a residual stream with its blocks; the removed ones are bypassed."""
    figure, axes = plt.subplots(figsize=(7.2, 1.9))
    removed = {2, 3, 6}
    for i in range(9):
        gone = i in removed
        axes.add_patch(
            FancyBboxPatch(
                (i + 0.2, 0.55),
                0.6,
                0.5,
                boxstyle="round,pad=0.02,rounding_size=0.08",
                facecolor="white" if gone else BLUE,
                edgecolor=GREY if gone else BLUE,
                linestyle="--" if gone else "-",
            )
        )
        axes.text(
            i + 0.5,
            0.8,
            str(i),
            ha="center",
            va="center",
            color=GREY if gone else "white",
        )
        axes.text(
            i + 0.5,
            1.25,
            "x = 1" if gone else "x = 0",
            ha="center",
            color=GREY,
            fontsize=8,
        )
        if not gone:
            for start, end in (
                ((i + 0.3, 0.2), (i + 0.3, 0.52)),
                ((i + 0.7, 0.52), (i + 0.7, 0.2)),
            ):
                axes.add_patch(
                    FancyArrowPatch(
                        start, end, arrowstyle="-|>", mutation_scale=8, color=BLUE
                    )
                )
    axes.add_patch(
        FancyArrowPatch(
            (-0.2, 0.2), (9.3, 0.2), arrowstyle="-|>", mutation_scale=12, color="black"
        )
    )
    axes.text(-0.2, -0.05, "residual stream", fontsize=9)
    axes.text(9.3, -0.05, "logits", fontsize=9, ha="right")
    axes.set(xlim=(-0.4, 9.6), ylim=(-0.2, 1.5))
    axes.axis("off")
    return figure


def couplings() -> plt.Figure:
    """Draw the measured own terms and couplings."""
    energy = hamiltonian()
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.2, 3.6), width_ratios=(1, 2.6), sharey=True
    )
    left.barh(np.arange(energy.n), energy.h, color=BLUE)
    left.set(
        xscale="log", xlabel="own term h, nats/token", ylabel="block", ylim=(29.5, -0.5)
    )
    size = np.quantile(np.abs(energy.J), 0.98)
    shown = np.where(np.eye(energy.n, dtype=bool), np.nan, energy.J)
    image = right.imshow(shown, cmap="PuOr", vmin=-size, vmax=size, aspect="auto")
    right.set(xlabel="block")
    figure.colorbar(
        image, ax=right, label="coupling J, nats/token (clipped)", shrink=0.9
    )
    return figure


def why_pairs() -> plt.Figure:
    """Draw the energy of choices that ignore the couplings, and of the ground states."""
    energy = hamiltonian()
    sizes = range(2, 15)
    order = np.argsort(energy.h, kind="stable")
    alone, best = [], []
    for m in sizes:
        state = np.zeros((1, energy.n), dtype=bool)
        state[0, order[:m]] = True
        alone.append(energy.energies(state)[0])
        best.append(lowest(energy, m, 1).energies[0])
    figure, axes = plt.subplots(figsize=(5.6, 3))
    axes.plot(
        sizes, alone, "o--", color=ORANGE, label="the M blocks of smallest own term"
    )
    axes.plot(sizes, best, "o-", color=BLUE, label="ground state (proven)")
    axes.set(xlabel="blocks removed, M (of 30)", ylabel="energy, nats/token")
    axes.legend(frameon=False)
    return figure


def spectrum() -> plt.Figure:
    """Draw the lowest states for M = 8: levels and removed blocks."""
    found = lowest(hamiltonian(), 8, 20)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(7.2, 3.6), width_ratios=(1, 2.6)
    )
    left.hlines(found.energies, 0, 1, color=BLUE)
    left.set(xticks=[], ylabel="energy, nats/token", title="levels")
    right.imshow(found.states, cmap="Blues", aspect="auto", vmin=0, vmax=1.3)
    right.set(
        xlabel="block (dark: removed)",
        ylabel="place in the spectrum",
        title="the 20 lowest states, M = 8",
        yticks=range(0, 20, 5),
    )
    return figure


def gate_curve() -> plt.Figure:
    """Draw the KL while blocks are faded out, and the parabola of its curvature at gate 1."""
    data = json.loads((HERE / "data" / "gate_curve.json").read_text(encoding="utf-8"))
    gate, kl = np.array(data["gate"]), np.array(data["kl"])
    figure, all_axes = plt.subplots(1, 3, figsize=(7.2, 2.6))
    step = 1 - gate
    for axes, block, row in zip(all_axes, data["blocks"], kl, strict=True):
        near = step <= 0.101
        # KL and its slope are zero at gate 1, so that the leading term is a parabola.
        curvature = (row[near] * step[near] ** 2).sum() / (step[near] ** 4).sum()
        axes.plot(
            step,
            curvature * step**2,
            "--",
            color=ORANGE,
            label="curvature at the start",
        )
        axes.plot(step, row, color=BLUE, label="measured")
        axes.set(title=f"block {block}", xlabel="block faded out", ylim=(0, None))
        axes.set_xticks([0, 1], ["original", "removed"])
    all_axes[0].set_ylabel("KL, nats/token")
    all_axes[0].legend(frameon=False, fontsize=8)
    return figure


def fidelity() -> plt.Figure:
    """Draw the measured KL against the energy, for two energies on the same states."""
    data = json.loads((HERE / "data" / "demo_states.json").read_text(encoding="utf-8"))
    kl = np.array([row["kl"] for row in data["states"]])
    candidate = np.array([row["candidate"] for row in data["states"]])
    figure, all_axes = plt.subplots(1, 2, figsize=(7.2, 3), sharey=True)
    for axes, (name, label) in zip(all_axes, data["energies"].items(), strict=True):
        energies = np.array([row[name] for row in data["states"]])
        for chosen, colour, words in (
            (~candidate, GREY, "random states"),
            (candidate, BLUE, "lowest of pairwise"),
        ):
            axes.plot(
                energies[chosen], kl[chosen], "o", color=colour, ms=4, label=words
            )
        spearman = data["spearman"][name]
        axes.set(title=f"{name}: Spearman {spearman:.2f}", xlabel=f"energy, {label}")
    all_axes[0].set_ylabel("measured KL, nats/token")
    all_axes[0].legend(frameon=False)
    return figure


PATCHED = 32768
"""Tokens that the patch is fitted on."""


def healed_rows(m: str, *more: str) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """Collect the stages of every method's state from the results of `studies/healing`.

    Args:
        more: further results to read.

    Returns:
        for each method, pairs of the tokens that a stage took and its results, ascending.
    """
    found: dict[str, dict[int, dict[str, Any]]] = {}
    # The first study of 6 and 9 blocks has another order of the text.
    for name in ("healing",) * (m == "12") + ("curve", "deep", *more):
        content = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for method, row in content["removals"].get(m, {}).items():
            for stage, state in row["stages"].items():
                tokens = PATCHED * (stage == "patched")
                if re.fullmatch(r"healed [\d.]+M", stage):
                    tokens = state["tokens_seen"]
                if tokens or stage == "cut":
                    found.setdefault(method, {})[tokens] = state
    return {method: sorted(rows.items()) for method, rows in found.items()}


def healing_curve() -> plt.Figure:
    """Draw the recovered share of the lost log-perplexity, and the KL, against tokens.

    Both are means over the two texts that all results have in common.
    """

    def mean(state: dict[str, Any], what: str) -> float:
        return float(
            np.mean([state["texts"][name][what] for name in ("wikitext2", "c4")])
        )

    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2))
    for m, colour in (("6", BLUE), ("9", GREEN), ("12", ORANGE), ("15", GREY)):
        states_of = healed_rows(m, "deep_12")
        (_, cut), *rows = states_of["isingcut"]
        tokens, states = [t / 1e6 for t, _ in rows], [state for _, state in rows]
        before = mean(cut, "original_nll")
        left_over = [
            (mean(s, "nll") - before) / (mean(cut, "nll") - before) for s in states
        ]
        won = [100 * (1 - share) for share in left_over]
        label = f"{m} of 30 blocks removed"
        for axes, values in ((left, won), (right, [mean(s, "kl") for s in states])):
            axes.plot(tokens[1:], values[1:], "o-", ms=4, color=colour, label=label)
            axes.plot(
                tokens[:2], values[:2], "o:", ms=4, mfc="white", color=colour, zorder=1
            )
        _, *peer = states_of["block-influence"]
        values = [mean(state, "kl") for _, state in peer]
        right.plot([t / 1e6 for t, _ in peer], values, "s--", ms=3, color=colour, lw=1)
    right.plot(
        [], [], "s--", ms=3, color="black", lw=1, label="state of block influence"
    )
    right.legend(frameon=False, fontsize=8)
    names = ("lost log-perplexity won back, %", "KL, nats/token")
    for axes, name in zip((left, right), names, strict=True):
        axes.set(
            xscale="log",
            xlabel="tokens, millions (white: the patch alone)",
            ylabel=name,
        )
        axes.minorticks_off()
        axes.set_xticks(ticks := [0.03, 0.1, 0.3, 1], [f"{t:g}" for t in ticks])
    left.legend(frameon=False, fontsize=8)
    return figure


def deep_cuts() -> plt.Figure:
    """Draw the KL after the cut, the patch and the healing, for 12, 15 and 18 of 30 blocks."""
    figure, all_axes = plt.subplots(1, 3, figsize=(9.6, 3.4), sharey=True)
    colours = {
        "isingcut": BLUE,
        "sleb": GREEN,
        "block-influence": ORANGE,
        "last": "black",
    }
    colours |= {"cbo": "purple", "random": "brown", "angular-window": GREY}
    colours |= {"effects-search": "crimson"}
    for axes, m in zip(all_axes, ("12", "15", "18"), strict=True):
        # At 12 a run takes the state of lowest KL as cut.
        methods = healed_rows(m, "deep_12" if m == "12" else "deep_near")
        for method, colour in colours.items():
            kl = [state["pooled"]["kl"] for _, state in methods.get(method, [])]
            if len(kl) > 1:
                style = "o--" if method == "sleb" else "o-"
                label = "the choice of a run" if method == "effects-search" else method
                axes.plot(range(len(kl)), kl, style, ms=4, color=colour, label=label)
        axes.set(title=f"{m} of 30 blocks removed", yscale="log")
        healed = [
            f"healed,\n{t / 1e6:.1g} M" for t, _ in max(methods.values(), key=len)[2:]
        ]
        axes.set_xticks(range(2 + len(healed)), ["cut", "patched", *healed])
        axes.set_yticks(ticks := [1, 2, 5, 10, 20], list(map(str, ticks)))
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8)
    all_axes[0].set_ylabel("KL, nats/token")
    return figure


def price_of_search() -> plt.Figure:
    """Draw the cost of the methods' choices, and their KL above the lowest, by removed blocks."""
    text = (STUDIES / "quality" / "results" / "quality.json").read_text(
        encoding="utf-8"
    )
    tables = [t for t in json.loads(text)["tables"] if t["chosen_on"] == "wiki"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.2))
    colours = {
        "refined": BLUE,
        "sleb": GREEN,
        "evopress": ORANGE,
        "pairwise-top20": GREY,
    }
    removed = [table["remove"] for table in tables]
    for name, colour in (colours | {"block-influence": "black"}).items():
        rows = [next(m for m in t["methods"] if m["method"] == name) for t in tables]
        found = [t["losses"]["pooled"]["kl"]["methods"] for t in tables]
        above = [
            100 * (kl[name]["value"] / min(r["value"] for r in kl.values()) - 1)
            for kl in found
        ]
        left.plot(
            removed,
            [row["passes"] for row in rows],
            "o-",
            ms=4,
            color=colour,
            label=name,
        )
        right.plot(removed, above, "o-", ms=4, color=colour)
    left.set(yscale="log", ylabel="forward passes over the text")
    left.set_yticks(ticks := [1, 3, 10, 30, 100], list(map(str, ticks)))
    left.minorticks_off()
    right.set(ylabel="KL above the lowest, %", ylim=(-2, 30))
    for axes in (left, right):
        axes.set(xlabel="removed blocks of 30", xticks=removed)
    left.legend(frameon=False, fontsize=8)
    return figure


PICTURES = {
    "removal": removal,
    "couplings": couplings,
    "why_pairs": why_pairs,
    "spectrum": spectrum,
    "gate_curve": gate_curve,
    "fidelity": fidelity,
    "healing_curve": healing_curve,
    "deep_cuts": deep_cuts,
    "price_of_search": price_of_search,
}


def main(folder: Path = HERE) -> None:
    for name, draw in PICTURES.items():
        figure = draw()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
        plt.close(figure)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
