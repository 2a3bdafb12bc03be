"""Every state a report shows, numbered once, so that all figures can speak of the same state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isingcut.ising.states import states_of
from isingcut.report.rows import Value
from isingcut.report.run_files import RunFiles
from isingcut.report.words import listed


@dataclass(frozen=True)
class KnownState:
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
    def kl(self) -> Value | None:
        """Measured KL in nats per token, with its standard error over samples."""
        return None if self.measured is None else measured_kl(self.measured)

    def tip(self, energy: float | None, unit: str, label: str = "energy") -> str:
        """What pointing at it says, where it has this energy, of that label."""
        lines = [self.name + (", the chosen one" if self.chosen else "")]
        if energy is not None:
            lines.append(f"{label} {energy:.4g} {unit}")
        if self.kl is not None:
            lines.append(f"measured KL {self.kl.text()} nats/token")
            lines += [f"{name}: KL {kl.text()}" for name, kl in kl_by_part(self.measured or {})]
        lines.append(f"without blocks {listed(self.removed)}")
        return "\n".join(lines)


def measured_kl(row: Mapping[str, Any]) -> Value:
    """The KL in a row of `candidates.json` or of another file of measured states."""
    return Value(float(row["kl"]), row["kl_se"])


def kl_by_part(row: Mapping[str, Any]) -> list[tuple[str, Value]]:
    """The KL in such a row on each part of a mixture; empty for one text."""
    return [(name, measured_kl(part)) for name, part in row.get("parts", {}).items()]


class Book(list[KnownState]):
    """The states of one removal: candidates by energy, then random ones, then baselines'."""

    def of(self, kind: str) -> list[KnownState]:
        """All states of a kind, in order."""
        return [s for s in self if s.kind == kind]


def book(files: RunFiles) -> Book:
    """Number the states that the files hold."""
    chosen = None if files.removed is None else tuple(files.removed)
    main, result = files.hamiltonian, Book()

    def add(name: str, kind: str, removed: Sequence[int], measured: dict[str, Any] | None) -> None:
        gone = tuple(sorted(removed))
        energy = None if main is None else float(main.energies(states_of(main.n, [gone]))[0])
        result.append(KnownState(len(result), name, kind, gone, energy, measured, gone == chosen))

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
    if chosen is not None and not any(state.chosen for state in result):
        add("state named by hand", "named", chosen, None)
    return result
