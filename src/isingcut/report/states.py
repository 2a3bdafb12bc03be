"""The states of a report, numbered once, so that all figures use the same numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from isingcut.files.states import BaselineFile, MeasuredState
from isingcut.ising.states import states_of
from isingcut.report.rows import Value, kl_of
from isingcut.report.run_files import RunFiles
from isingcut.report.words import join_blocks


@dataclass(frozen=True)
class ReportState:
    """A numbered state of a report.

    Attributes:
        number: index in the list of all.
        name: display name, for example ``"state 11"``.
        kind: ``candidate``, ``random``, ``baseline`` or ``named`` (given by hand).
        removed: removed blocks, ascending.
        energy: value of the run's main energy, or None before that is measured.
        measured: measured losses, or None.
        chosen: whether these are the removed blocks of the run (`RunFiles.removed`).
    """

    number: int
    name: str
    kind: str
    removed: tuple[int, ...]
    energy: float | None
    measured: MeasuredState | BaselineFile | None
    chosen: bool

    @property
    def kl(self) -> Value | None:
        """Measured KL in nats per token, with its standard error over samples."""
        return None if self.measured is None else kl_of(self.measured)

    def tip(self, energy: float, unit: str, label: str) -> str:
        """Return the tooltip text of the state, with the given energy."""
        name = self.name + (", the chosen one" if self.chosen else "")
        lines = [name, f"{label} {energy:.4g} {unit}"]
        if self.kl is not None:
            lines.append(f"measured KL {self.kl.text()} nats/token")
        if isinstance(self.measured, MeasuredState):
            parts = self.measured.parts.items()
            lines += [f"{name}: KL {kl_of(part).text()}" for name, part in parts]
        lines.append(f"without blocks {join_blocks(self.removed)}")
        return "\n".join(lines)


def number_states(files: RunFiles) -> list[ReportState]:
    """Collect and number the states of a removal: candidates by energy, random ones, the choices
    of baselines, and one named by hand."""
    ranking = files.candidates
    candidates = ranking.candidates if ranking else []
    measured = {tuple(row.removed): row for row in candidates}
    low = files.spectrum.states if files.spectrum else candidates
    chosen = files.removed
    main = files.hamiltonian
    numbered = list[ReportState]()

    def add(name: str, kind: str, gone: list[int], loss: Any = None) -> None:
        energy = main.energy(states_of(main.n, [gone])[0]) if main else None
        state = ReportState(
            len(numbered), name, kind, tuple(gone), energy, loss, gone == chosen
        )
        numbered.append(state)

    for rank, s in enumerate(low):
        loss = measured.get(tuple(s.removed))
        add(f"state {rank}", "candidate", s.removed, loss)
    for k, row in enumerate(ranking.random if ranking else []):
        add(f"random state {k}", "random", row.removed, row)
    for b in files.baselines:
        add(f"choice of {b.baseline}", "baseline", b.removed, b)
    if chosen is not None and not any(state.chosen for state in numbered):
        add("state named by hand", "named", chosen)
    return numbered


def list_rivals(files: RunFiles, states: Sequence[ReportState]) -> list[dict[str, Any]]:
    """List the choices of all baselines and of the run itself, lowest measured KL first.

    The run's choice is listed if it was measured. Without a baseline, the list is empty.

    Returns:
        for each choice the ``name`` of the method, the ``state``, and the ``passes`` and ``tokens``
        that finding it took, None if they were not counted.
    """
    chosen_by = [s for s in states if s.kind == "baseline"]
    rivals: list[dict[str, Any]] = [
        {
            "name": b.baseline,
            "state": state,
            "passes": b.passes,
            "tokens": b.tokens_searched,
        }
        for state, b in zip(chosen_by, files.baselines, strict=True)
    ]
    own = [s for s in states if s.chosen and isinstance(s.measured, MeasuredState)]
    if rivals and own:
        meta = files.meta
        passes = meta.passes
        if passes is None and meta.blocks_run is not None:
            passes = meta.blocks_run / len(files.blocks)
        costs = {"passes": passes, "tokens": meta.tokens}
        rivals.append({"name": files.energy, "state": own[0], **costs})
    return sorted(rivals, key=lambda rival: rival["state"].measured.kl)
