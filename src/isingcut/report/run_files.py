"""What the files of a run folder say of one removal: read once, for every form of the report.

Reads files only, never a model, and loads no torch. A file that is not there is None.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from isingcut.errors import StageFileError
from isingcut.files import read_json
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.outputs import check_recorded
from isingcut.report.baselines import baselines_won, sort_baselines
from isingcut.report.words import ranking_warnings

T = TypeVar("T")


@dataclass(frozen=True)
class Removal:
    """The results of one removal of a run: the run's own, or one of its `remove-SPEC` folders.

    Attributes:
        name: what was asked for, for example ``"6"`` or ``"params=25%"``.
        cut: blocks that its checkpoint lacks, None before there is one.
        own: it is the removal that is being reported.
    """

    name: str
    spectrum: dict[str, Any] | None
    candidates: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    cut: list[int] | None
    own: bool

    @property
    def best(self) -> dict[str, Any] | None:
        """What was cut, as the ranking measured it; before a cut, the ranking's choice.

        Before a ranking it is the ground state, without a loss. None where blocks were named by
        hand that no ranking measured.
        """
        if self.candidates is not None:
            found: dict[str, Any] = self.candidates["chosen"]
            if self.cut is None or sorted(found["removed"]) == self.cut:
                return found
            rows = [*self.candidates["candidates"], *self.candidates["random"]]
            return next((r for r in rows if sorted(r["removed"]) == self.cut), None)
        if self.spectrum is not None and self.spectrum["states"]:
            ground: dict[str, Any] = self.spectrum["states"][0]
            return ground
        return None


@dataclass(frozen=True, eq=False)
class RunFiles:
    """Everything a report is made of.

    Attributes:
        folder: the run folder.
        target: where the files of this removal are: the run folder itself or one below it.
        run: `run.json`.
        removal: the record inside the checkpoint, `model/isingcut.json`.
        others: Hamiltonians measured beside the main one, by name.
        baselines: the contents of all `baseline-NAME.json`, lowest measured KL first.
        healing: `healing.json`: losses over the steps, and the scores before and after.
        healed_candidates: `healed-candidates.json`: candidates compared after a little healing.
        benchmarks: `benchmarks.json`: under ``rows`` task, metric, scores of both models.
        removals: all removals solved in the folder, fewest blocks first.
        healed: a healed checkpoint is there; the evaluation is then of it.
        gguf: a cut GGUF file is there.
    """

    folder: Path
    target: Path
    run: dict[str, Any]
    spectrum: dict[str, Any] | None = None
    candidates: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    removal: dict[str, Any] | None = None
    hamiltonian: Hamiltonian | None = None
    others: dict[str, Hamiltonian] = field(default_factory=dict)
    baselines: list[dict[str, Any]] = field(default_factory=list)
    healing: dict[str, Any] | None = None
    healed_candidates: dict[str, Any] | None = None
    benchmarks: dict[str, Any] | None = None
    removals: list[Removal] = field(default_factory=list)
    healed: bool = False
    gguf: bool = False

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """The model's blocks as `run.json` describes them."""
        blocks: list[dict[str, Any]] = self.run["blocks"]["blocks"]
        return blocks

    @property
    def energy(self) -> str:
        """The name of the energy that chose."""
        return str(self.run["config"]["energy"])

    @property
    def model(self) -> str:
        """The model as it was named."""
        return str(self.run["provenance"]["model"]["name"])

    @property
    def meta(self) -> dict[str, Any] | None:
        """The energy's provenance."""
        return None if self.hamiltonian is None else dict(self.hamiltonian.meta)

    @property
    def removed(self) -> list[int] | None:
        """What is gone from the checkpoint; without one, what was chosen."""
        if self.removal is not None:
            return sorted(self.removal["removed"])
        return None if self.candidates is None else sorted(self.candidates["chosen"]["removed"])

    @property
    def judged(self) -> dict[str, dict[str, Any]]:
        """How well each energy ranked measured losses, by the energy's name."""
        if self.candidates is None:
            return {}
        return {
            self.energy: self.candidates["fidelity"],
            **self.candidates.get("fidelity_of_others", {}),
        }

    @property
    def warnings(self) -> list[str]:
        """What a reader must know before trusting the energy."""
        if self.candidates is None:
            return []
        return ranking_warnings(self.energy, self.candidates)

    @property
    def won(self) -> list[str]:
        """Baselines that found a lower measured KL than the chosen state has."""
        return baselines_won(self.baselines, self.candidates)

    @property
    def not_run(self) -> list[str]:
        """Stages whose files are not there."""
        absent = {
            "energy": self.hamiltonian,
            "solve": self.spectrum,
            "rank": self.candidates,
            "excise": self.removal,
            "evaluate": self.evaluation,
        }
        return [stage for stage, found in absent.items() if found is None]

    @property
    def title(self) -> str:
        """The model and how many of its blocks are gone."""
        total, removed = len(self.blocks), self.removed
        if removed is None:
            return f"{self.model}: {total} blocks"
        return f"{self.model} without {len(removed)} of its {total} blocks"

    @property
    def arguments(self) -> str:
        """What to type after a stage's verb to work on this removal."""
        name = self.folder.resolve().name
        if self.target == self.folder:
            return name
        key = (self.target / "spectrum.json").relative_to(self.folder).as_posix()
        record = self.run["stages"].get(key)
        return name if record is None else f"{name} --remove {record['options'].get('remove')}"

    @property
    def checkpoint(self) -> str | None:
        """How the checkpoint is reached from where the run folder is."""
        if self.removal is None:
            return None
        name = "healed" if self.healed else "model"
        below = (self.target / name).relative_to(self.folder)
        return (Path(self.folder.resolve().name) / below).as_posix()


def read_run(folder: Path, target: Path | None = None) -> RunFiles:
    """All files of one removal of a run.

    Args:
        folder: the run folder, with its `run.json`.
        target: where the files of one removal are; by default the run folder itself.

    Raises:
        StageFileError: `run.json` is missing, or a file that is there is damaged.
    """
    target = target or folder
    run = read_json(folder / "run.json", "run")

    def optional(path: Path, kind: str) -> dict[str, Any] | None:
        return _optional(run, folder, path, kind)

    return RunFiles(
        folder,
        target,
        run,
        spectrum=with_searched(
            optional(target / "spectrum.json", "spectrum"),
            optional(target / "candidates.json", "candidates"),
        ),
        candidates=optional(target / "candidates.json", "candidates"),
        evaluation=optional(target / "evaluation.json", "evaluation"),
        removal=_removal(run, folder, target),
        hamiltonian=_hamiltonian(run, folder, folder / "hamiltonian.safetensors"),
        others={
            path.name.removeprefix("hamiltonian.").removesuffix(".safetensors"): other
            for path in sorted(folder.glob("hamiltonian.*.safetensors"))
            if (other := _hamiltonian(run, folder, path)) is not None
        },
        baselines=sort_baselines(
            found
            for path in sorted(target.glob("baseline-*.json"))
            if (found := optional(path, "baseline")) is not None
        ),
        healing=_healing(run, folder, target),
        healed_candidates=optional(target / "healed-candidates.json", "healed-candidates"),
        benchmarks=optional(target / "benchmarks.json", "benchmarks"),
        removals=_removals(folder, target, run),
        healed=(target / "healed").is_dir(),
        gguf=(target / "model.gguf").is_file(),
    )


def _hamiltonian(run: dict[str, Any], folder: Path, path: Path) -> Hamiltonian | None:
    return _read(run, folder, path, Hamiltonian.load)


def without_header(document: dict[str, Any] | None) -> dict[str, Any] | None:
    """A results file's content alone."""
    if document is None:
        return None
    return {k: v for k, v in document.items() if k not in ("format", "version")}


def _optional(run: dict[str, Any], folder: Path, path: Path, kind: str) -> dict[str, Any] | None:
    return _read(run, folder, path, lambda file: read_json(file, kind))


def _read(run: dict[str, Any], folder: Path, path: Path, read: Callable[[Path], T]) -> T | None:
    """What the file of a finished stage holds, as the run wrote it; None where it is not there.

    Raises:
        StageFileError: it was changed since, is damaged, or does not fit the run's model.
    """
    record = run["stages"].get(path.relative_to(folder).as_posix())
    if not os.path.lexists(path) or (record is not None and not record["done"]):
        return None
    check_recorded(run["stages"], folder, path)
    found = read(path)
    _fit(run, path, found)
    return found


def _fit(run: dict[str, Any], path: Path, found: Any) -> None:
    from isingcut import documents

    documents.fit(path, found, len(run["blocks"]["blocks"]))


def _removal(run: dict[str, Any], folder: Path, target: Path) -> dict[str, Any] | None:
    """The record inside the checkpoint, which must say what the run cut."""
    path = target / "model" / "isingcut.json"
    record = run["stages"].get((target / "model").relative_to(folder).as_posix(), {})
    if not path.exists() or not record.get("done"):
        return None
    found = read_json(path, "removal")
    _fit(run, path, found)
    if found["removed"] != record["options"]["removed"]:
        raise StageFileError(
            f"{path} names other blocks than the run cut; delete {path.parent} and excise again"
        )
    return found


def _healing(run: dict[str, Any], folder: Path, target: Path) -> dict[str, Any] | None:
    """The record of a healing that is finished."""
    record = run["stages"].get((target / "healed").relative_to(folder).as_posix(), {})
    path = target / "healing.json"
    if not record.get("done") or not os.path.lexists(path):
        return None
    found = read_json(path, "healing")
    _fit(run, path, found)
    return found


def _removals(folder: Path, target: Path, run: dict[str, Any]) -> list[Removal]:
    found = []
    for place in (folder, *sorted(p for p in folder.glob("remove-*") if p.is_dir())):
        spectrum = _optional(run, folder, place / "spectrum.json", "spectrum")
        candidates = _optional(run, folder, place / "candidates.json", "candidates")
        if spectrum is None and candidates is None:
            continue
        config = run["config"]
        name = str(config.get("remove") or config.get("budget") or "")
        if place != folder:
            key = (place / "spectrum.json").relative_to(folder).as_posix()
            options = run["stages"].get(key, {}).get("options", {})
            name = str(options.get("remove") or options.get("budget") or place.name[7:])
        evaluation = _optional(run, folder, place / "evaluation.json", "evaluation")
        record = _removal(run, folder, place)
        cut = None if record is None else sorted(record["removed"])
        found.append(Removal(name, spectrum, candidates, evaluation, cut, place == target))
    return sorted(found, key=lambda r: len(r.best["removed"]) if r.best else 0)


def with_searched(
    spectrum: dict[str, Any] | None, candidates: dict[str, Any] | None
) -> dict[str, Any] | None:
    """A spectrum with the candidates that a search found beyond it, ranked by energy.

    ``searched`` counts them. A spectrum that was solved anew since is left as it is.
    """
    if spectrum is None or candidates is None:
        return spectrum
    own = {tuple(s["removed"]) for s in spectrum["states"]}
    rows = {tuple(r["removed"]): r["energy"] for r in candidates["candidates"]}
    if not own <= rows.keys():
        return spectrum
    more = [
        {"removed": list(removed), "energy": energy}
        for removed, energy in rows.items()
        if removed not in own
    ]
    states = sorted([*spectrum["states"], *more], key=lambda s: float(s["energy"]))
    ranked = [{**state, "rank": rank} for rank, state in enumerate(states)]
    return {**spectrum, "states": ranked, "searched": len(more)}
