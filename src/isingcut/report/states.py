"""Every state a report shows, numbered once, so that all figures can speak of the same state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from isingcut.report.run_files import RunFiles
from isingcut.report.words import plus_minus


@dataclass(frozen=True)
class State:
    """A state as the page knows it.

    Attributes:
        number: its place in the book.
        name: what it is called, for example ``"state 11"``.
        kind: ``candidate``, ``random``, ``baseline`` or ``named`` (by hand).
        removed: its removed blocks, ascending.
        energy: of the main energy, or None before it is measured.
        measured: its row of `candidates.json` or of a baseline: ``kl``, ``kl_se``, ...
        chosen: its blocks are the ones that are removed.
    """

    number: int
    name: str
    kind: str
    removed: tuple[int, ...]
    energy: float | None
    measured: dict[str, Any] | None
    chosen: bool

    @property
    def kl(self) -> float | None:
        """Measured KL in nats per token."""
        return None if self.measured is None else float(self.measured["kl"])

    @property
    def kl_se(self) -> float | None:
        """Its standard error over samples."""
        error = None if self.measured is None else self.measured["kl_se"]
        return None if error is None else float(error)

    def tip(self, unit: str) -> str:
        """What pointing at it says."""
        lines = [self.name + (", the chosen one" if self.chosen else "")]
        if self.energy is not None:
            lines.append(f"energy {self.energy:.4g} {unit}")
        if self.kl is not None:
            lines.append(f"measured KL {plus_minus(self.kl, self.kl_se)} nats/token")
        lines.append("without blocks " + " ".join(map(str, self.removed)))
        return "\n".join(lines)


@dataclass
class Book:
    """The states of one removal: candidates by energy, then random ones, then baselines'."""

    states: list[State] = field(default_factory=list)

    def of(self, kind: str) -> list[State]:
        """All states of a kind, in order."""
        return [s for s in self.states if s.kind == kind]

    def find(self, removed: Sequence[int]) -> State | None:
        """The first state without these blocks."""
        wanted = tuple(sorted(removed))
        return next((s for s in self.states if s.removed == wanted), None)


def book(files: RunFiles) -> Book:
    """Number the states that the files hold."""
    chosen = None if files.removed is None else tuple(files.removed)
    result = Book()

    def add(name: str, kind: str, removed: Sequence[int], measured: dict[str, Any] | None) -> None:
        gone = tuple(sorted(removed))
        result.states.append(
            State(len(result.states), name, kind, gone, energy(gone), measured, gone == chosen)
        )

    def energy(gone: tuple[int, ...]) -> float | None:
        if files.hamiltonian is None:
            return None
        state = np.zeros(files.hamiltonian.n, dtype=bool)
        state[list(gone)] = True
        return files.hamiltonian.energy(state)

    rows = [] if files.candidates is None else files.candidates["candidates"]
    found = {tuple(sorted(r["removed"])): r for r in rows}
    if files.spectrum is not None:
        for state in files.spectrum["states"]:
            row = found.get(tuple(sorted(state["removed"])))
            add(f"state {state['rank']}", "candidate", state["removed"], row)
    else:
        for rank, row in enumerate(rows):
            add(f"state {rank}", "candidate", row["removed"], row)
    for k, row in enumerate([] if files.candidates is None else files.candidates["random"]):
        add(f"random state {k}", "random", row["removed"], row)
    for baseline in files.baselines:
        add(f"choice of {baseline['baseline']}", "baseline", baseline["removed"], baseline)
    if chosen is not None and result.find(chosen) is None:
        add("state named by hand", "named", chosen, None)
    return result
