"""How far an energy is to be trusted, in tables and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

POOR_SPEARMAN = 0.6
"""Below this rank correlation the energy is called a poor guide."""
FAR_TOO_LOW = 0.5
"""Below this share of its measured loss a state's energy is called far too low."""
FEW_STATES = 30


def fidelity_rows(judged: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Rows of the fidelity table: energy, loss, states, Spearman, Kendall, n; none unmeasured."""
    kinds = (
        ("kl", "KL", "candidates and random"),
        ("nll", "NLL", "candidates and random"),
        ("kl_random_only", "KL", "random only"),
    )
    rows: list[tuple[str, ...]] = []
    for energy, losses in judged.items():
        if not losses["kl"]["n"]:
            continue
        for key, loss, states in kinds:
            if key in losses:
                found = losses[key]
                figures = (correlation_text(found, "spearman"), correlation_text(found, "kendall"))
                rows.append((f"`{energy}`", loss, states, *figures, str(found["n"])))
    return rows


def measured_words(candidates: Mapping[str, Any]) -> str:
    """How many states were measured, on how many tokens, and what was judged on which."""
    states, others = len(candidates["candidates"]), len(candidates["random"])
    tokens, few = candidates["tokens"], candidates.get("random_tokens")
    said = f"{states} candidates (the lowest states of the energy)"
    where = f"measured on {tokens} tokens of the ranking split"
    if not candidates["fidelity"]["kl"]["n"]:
        return f"{said}, {where}. How well the energy ranks was not measured."
    if few in (None, 0, tokens):
        return f"{said} and {others} random states of the same constraints, {where}."
    return (
        f"{said}, {where}, and {others} random states of the same constraints, on {few} of these; "
        "the energy is judged on those, for the candidates too."
    )


def correlation_text(found: Mapping[str, Any], name: str) -> str:
    """A rank correlation with its 95 % interval."""
    if found.get(name) is None:
        return "undefined" if found["n"] else "not measured"
    low, high = found.get(f"{name}_low"), found.get(f"{name}_high")
    interval = "" if low is None or high is None else f" ({low:.2f} to {high:.2f})"
    return f"{found[name]:.2f}{interval}"


def ranking_warnings(energy: str, candidates: Mapping[str, Any]) -> list[str]:
    """What to know before trusting a choice; empty where the energy ranked and priced it well.

    Args:
        energy: its name.
        candidates: content of `candidates.json`.
    """
    said = fidelity_warnings(energy, candidates["fidelity"]["kl"])
    chosen = candidates["chosen"]
    if (
        candidates.get("energy_unit") == "nats/token"
        and chosen["energy"] < FAR_TOO_LOW * chosen["kl"]
    ):
        advice = "search longer (--effort)" if energy == "refined" else "use --energy auto"
        said.append(
            f"`{energy}` puts the chosen state at {chosen['energy']:.3g} nats per token, measured "
            f"were {chosen['kl']:.3g}: three and more blocks interact here in ways that it does "
            f"not know. Better states may lie where it did not look: {advice}, or remove fewer "
            "blocks."
        )
    return said


def fidelity_warnings(energy: str, found: Mapping[str, Any]) -> list[str]:
    """What a reader must know before trusting the energy; empty when it ranked well."""
    said = []
    value, low = found["spearman"], found.get("spearman_low")
    if not found["n"]:
        said.append(unjudged(energy))
    elif value is None:
        said.append(
            f"The rank correlation of `{energy}` with measured losses is undefined here (too few "
            "states, or all alike): how well it ranks is not known."
        )
    elif value < POOR_SPEARMAN:
        said.append(
            f"`{energy}` ranked the measured states poorly (Spearman {value:.2f}, below "
            f"{POOR_SPEARMAN}). Do not trust its spectrum beyond the states measured: use more "
            "samples, another --energy, or more --states."
        )
    elif low is not None and low < POOR_SPEARMAN:
        said.append(
            f"The interval of the Spearman correlation of `{energy}` reaches down to {low:.2f}: "
            "that it ranks well is not established; measure more --random-states."
        )
    if value is not None and found["n"] < FEW_STATES:
        said.append(f"Only {found['n']} states were measured; the correlation is uncertain.")
    return said


def unjudged(energy: str) -> str:
    """That an energy's fidelity was left out."""
    return (
        f"How well `{energy}` ranks was not measured (--random-states 0): only that the candidates "
        "have the losses measured is known."
    )
