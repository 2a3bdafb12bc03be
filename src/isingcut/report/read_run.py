"""The files of a run folder that one removal rests on, each checked as it is read.

Reads files only, never a model, and loads no torch. A file that is not there is None.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from isingcut.errors import StageFileError
from isingcut.files import documents
from isingcut.files.outputs import check_recorded
from isingcut.files.writing import read_json
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.report.run_files import RemovalFiles, RunFiles

T = TypeVar("T")


def read_run(folder: Path, target: Path | None = None) -> RunFiles:
    """All files of one removal of a run.

    Args:
        folder: the run folder, with its `run.json`.
        target: where the files of one removal are; by default the run folder itself.

    Raises:
        StageFileError: `run.json` is missing, or a file that is there is damaged.
    """
    target = target or folder
    files = _Folder(folder, read_json(folder / "run.json", "run"))
    candidates = files.document(target / "candidates.json", "candidates")
    baselines = [files.document(p, "baseline") for p in sorted(target.glob("baseline-*.json"))]
    others = {
        path.name.removeprefix("hamiltonian.").removesuffix(".safetensors"): files.energy(path)
        for path in sorted(folder.glob("hamiltonian.*.safetensors"))
    }
    return RunFiles(
        folder,
        target,
        files.run,
        spectrum=with_searched(files.document(target / "spectrum.json", "spectrum"), candidates),
        candidates=candidates,
        evaluation=files.document(target / "evaluation.json", "evaluation"),
        removal=files.removal(target),
        hamiltonian=files.energy(folder / "hamiltonian.safetensors"),
        others={name: energy for name, energy in others.items() if energy is not None},
        baselines=sorted((b for b in baselines if b is not None), key=lambda b: float(b["kl"])),
        healing=files.healing(target),
        healed_candidates=files.document(target / "healed-candidates.json", "healed-candidates"),
        benchmarks=files.document(target / "benchmarks.json", "benchmarks"),
        removals=files.removals(target),
        healed=(target / "healed").is_dir(),
        exact=files.finished(target / "cut"),
        gguf=(target / "model.gguf").is_file(),
    )


@dataclass(frozen=True)
class _Folder:
    """A run folder and its `run.json`; reads what finished stages wrote, and None for the rest."""

    path: Path
    run: dict[str, Any]

    def document(self, path: Path, kind: str) -> dict[str, Any] | None:
        """A results file."""
        return self._read(path, lambda file: read_json(file, kind))

    def energy(self, path: Path) -> Hamiltonian | None:
        """A measured Hamiltonian."""
        return self._read(path, Hamiltonian.load)

    def _record(self, path: Path) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.run["stages"].get(
            path.relative_to(self.path).as_posix()
        )
        return found

    def _read(self, path: Path, read: Callable[[Path], T]) -> T | None:
        """What the file of a finished stage holds, as the run wrote it.

        Raises:
            StageFileError: it was changed since, is damaged, or does not fit the run's model.
        """
        record = self._record(path)
        if not os.path.lexists(path) or (record is not None and not record["done"]):
            return None
        check_recorded(self.run["stages"], self.path, path)
        return self._fitting(path, read)

    def _fitting(self, path: Path, read: Callable[[Path], T]) -> T:
        found = read(path)
        documents.fit(path, found, len(self.run["blocks"]["blocks"]))
        return found

    def finished(self, path: Path) -> bool:
        """Whether a stage has written it to its end."""
        return bool((self._record(path) or {}).get("done")) and os.path.lexists(path)

    def removal(self, target: Path) -> dict[str, Any] | None:
        """The record inside the checkpoint, which must say what the run cut."""
        path = target / "model" / "isingcut.json"
        record = self._record(target / "model")
        if record is None or not record["done"] or not path.exists():
            return None
        found = self._fitting(path, lambda file: read_json(file, "removal"))
        if found["removed"] != record["options"]["removed"]:
            raise StageFileError(
                f"{path} names other blocks than the run cut; delete {path.parent} and excise again"
            )
        return found

    def healing(self, target: Path) -> dict[str, Any] | None:
        """The record of a healing that is finished."""
        path, record = target / "healing.json", self._record(target / "healed")
        if record is None or not record["done"] or not os.path.lexists(path):
            return None
        return self._fitting(path, lambda file: read_json(file, "healing"))

    def removals(self, own: Path) -> list[RemovalFiles]:
        """All removals that were solved here, fewest blocks first."""
        found = []
        below = sorted(p for p in self.path.glob("remove-*") if p.is_dir())
        for place in (self.path, *below):
            spectrum = self.document(place / "spectrum.json", "spectrum")
            candidates = self.document(place / "candidates.json", "candidates")
            if spectrum is None and candidates is None:
                continue
            asked, name = self.run["config"], ""
            if place != self.path:
                solved = self._record(place / "spectrum.json") or {"options": {}}
                asked, name = solved["options"], place.name.removeprefix("remove-")
            evaluation = self.document(place / "evaluation.json", "evaluation")
            record = self.removal(place)
            found.append(
                RemovalFiles(
                    str(asked.get("remove") or asked.get("budget") or name),
                    spectrum,
                    candidates,
                    evaluation,
                    None if record is None else sorted(record["removed"]),
                    place == own,
                )
            )
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
