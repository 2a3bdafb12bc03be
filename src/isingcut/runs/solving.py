"""The stages that need files of the run folder only, and no model: `solve` and `report`.

Each writes its file and does nothing when that is there, made with the same options
(`RunFolder.stage`). Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from isingcut.errors import InputError, StageFileError
from isingcut.files.documents import CandidatesFile
from isingcut.files.writing import read_document
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import imports, registry
from isingcut.ising.solvers import solve as find
from isingcut.ising.spectrum import Spectrum
from isingcut.options.config import RunConfig
from isingcut.report.write import write_report
from isingcut.runs.folder import RunFolder
from isingcut.runs.removal import make_problem


def solve(folder: RunFolder, config: RunConfig) -> Spectrum:
    """Stage `solve`: `spectrum.json` of one removal, from the Hamiltonian's file alone."""
    file = folder.path / "hamiltonian.safetensors"
    if not file.exists():
        raise StageFileError(
            f"expected {file}, which is not there; run: isingcut energy MODEL --out {folder.path}"
        )
    problem = problem_of(folder, config)
    options = solve_options(folder, config)

    def make(path: Path) -> None:
        if imports(config.solver) and folder.typed_solver != config.solver:
            raise InputError(
                f"{folder.path} asks for the solver {config.solver}, whose code would be imported; "
                f"if you trust it, type it yourself: --solver {config.solver}"
            )
        spectrum = find(
            problem, config.solver, config.states, diverse=config.diverse, **_solver_options(config)
        )
        spectrum.save(path)

    target = folder.target(config.removal)
    return folder.stage("solve", target / "spectrum.json", options, make, Spectrum.load)


def problem_of(folder: RunFolder, config: RunConfig) -> Problem:
    """The constrained problem of one removal of this folder's Hamiltonian."""
    hamiltonian = folder.load(folder.path / "hamiltonian.safetensors", Hamiltonian.load)
    return make_problem(hamiltonian, folder.manifest["blocks"], config)


def _solver_options(config: RunConfig) -> dict[str, Any]:
    """Seed and time limit, for a solver that has such options."""
    part = registry.get(config.solver)
    fields = {f.name for f in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else set()
    given = {"seed": config.seed, "seconds": config.solve_seconds}
    return {k: v for k, v in given.items() if k in fields}


def solve_options(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    record = folder.manifest["stages"].get("hamiltonian.safetensors")
    if record is None or not record["done"]:
        raise StageFileError(
            f"the energy of {folder.path} is not finished; "
            f"run: isingcut energy MODEL --out {folder.path}"
        )
    keys = ("remove", "budget", "keep", "drop", "solver", "states", "diverse", "seed")
    return {"energy": record["fingerprint"]} | {k: getattr(config, k) for k in keys}


def needs(folder: RunFolder, config: RunConfig, name: str, stage: str) -> Path:
    """A file of an earlier stage of this removal."""
    path = folder.target(config.removal) / name
    if not path.exists():
        which = f"--remove {config.remove}" if config.remove else f"--budget {config.budget}"
        raise StageFileError(
            f"expected {path}, which is not there; type: isingcut {stage} {folder.path} {which}"
        )
    return path


def load_candidates(path: Path) -> CandidatesFile:
    """The ranking in a `candidates.json`."""
    return read_document(path, CandidatesFile)


def chosen_blocks(folder: RunFolder, config: RunConfig) -> list[int]:
    """The blocks that the ranking of one removal chose."""
    found = folder.load(needs(folder, config, "candidates.json", "rank"), load_candidates)
    return found.chosen.removed


def report(folder: RunFolder, remove: str) -> Path:
    """Stage `report`: `report.html`, `.md` and `.json`, from the folder's files alone."""
    target = folder.target(remove)
    with folder.writing():
        write_report(folder.path, target)
    return target / "report.md"
