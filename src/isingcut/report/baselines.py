"""Other methods' choices beside the run's own: losses, price and broken constraints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isingcut.report.rows import plus_minus
from isingcut.report.run_files import RunFiles
from isingcut.report.states import Book, KnownState
from isingcut.report.words import numbers


@dataclass(frozen=True)
class Rival:
    """One method's choice, or the run's own.

    Attributes:
        name: of the method, or of the energy that chose.
        state: what it removes, and the losses of that.
        passes: full forward passes that it took; empty where they were not counted.
        tokens: those that it looked at; empty where that is not known.
        settings: its options, as they were typed.
        merged: blocks into which it merged the others.
        violated: constraints that it breaks.
        own: it is the run's own.
    """

    name: str
    state: KnownState
    passes: str
    tokens: str
    settings: Sequence[str] = ()
    merged: Sequence[int] = ()
    violated: Sequence[str] = ()
    own: bool = False


def rivals(files: RunFiles, states: Book) -> list[Rival]:
    """Every method that chose for this removal and the chosen state, lowest KL first.

    Without another method there is none.
    """
    if not files.baselines:
        return []
    found = [
        Rival(
            str(b["baseline"]),
            state,
            f"{b['passes']:.3g}",
            str(b["tokens_searched"]),
            b.get("settings", ()),
            [group[0] for group in b.get("merges", ())],
            b["violated"],
        )
        for state, b in zip(states.of("baseline"), files.baselines, strict=True)
    ]
    ranked = (*states.of("candidate"), *states.of("random"))
    chosen = next((s for s in ranked if s.chosen and s.kl is not None), None)
    if chosen is not None:
        meta = files.meta or {}
        passes, tokens = _passes(meta, len(files.blocks)), str(meta.get("tokens", ""))
        found.append(Rival(files.energy, chosen, passes, tokens, own=True))
    return sorted(found, key=lambda r: r.state.kl.figure if r.state.kl is not None else 0.0)


def rival_row(rival: Rival) -> tuple[str, ...]:
    """Method, blocks removed, KL, NLL, passes, tokens searched and broken constraints, as text."""
    row = rival.state.measured or {}
    name = f"chosen (`{rival.name}`)" if rival.own else f"`{rival.name}`"
    blocks = numbers(rival.state.removed)
    if rival.merged:
        blocks += f", merged into {numbers(rival.merged)}"
    return (
        ", ".join([name, *rival.settings]),
        blocks,
        plus_minus(row["kl"], row["kl_se"]),
        plus_minus(row["nll"], row["nll_se"]),
        rival.passes or "not counted",
        rival.tokens or "unknown",
        ", ".join(rival.violated) or "none",
    )


def _passes(meta: Mapping[str, Any], blocks: int) -> str:
    """Full forward passes that the energy took, where it was counted."""
    if "passes" in meta:
        return f"{meta['passes']:.3g}"
    return f"{meta['blocks_run'] / blocks:.3g}" if "blocks_run" in meta else ""
