"""The stages that only need files of a run folder, `solve` and `report`, and the results before.

Nothing here imports torch.
"""

from __future__ import annotations

import inspect
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from isingcut.errors import InputError, StageFileError
from isingcut.files.results import read_document
from isingcut.files.stages import SOLVING, STAGES, Outdated
from isingcut.files.states import CandidatesFile
from isingcut.files.store import Store
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import imports, registry
from isingcut.ising.solvers import solve as find
from isingcut.ising.spectrum import Spectrum
from isingcut.options.search import SearchOptions
from isingcut.options.solve import SolveOptions
from isingcut.report.write import write_report
from isingcut.runs.constraints import removal_rows
from isingcut.runs.stages import Inputs, Planned, Runner, stage

if TYPE_CHECKING:
    from isingcut.runs.context import Context


SECONDS = 60.0
"""Time limit of a solver."""


def _plan(runner: Runner, config: SolveOptions) -> Planned:
    folder = runner.folder
    # An unusable solver or energy is named before anything is written.
    registry.get(config.solver)
    problem = Problem(read_energy(folder), removal_rows(folder.run.blocks, config))
    trusted = not imports(config.solver) or folder.typed_solver == config.solver
    out = folder.target(config.removal) / "spectrum.json"
    return Planned(out, {"trusted": trusted, "problem": problem})


@stage("solve", Spectrum.load, plan=_plan)
def solve(context: Context, inputs: Inputs, options: Any, out: Path) -> None:
    if not options.trusted:
        raise InputError(
            f"the options of {inputs.folder.path} have --solver {options.solver}, which imports "
            f"third-party code; if you trust it, type --solver {options.solver} yourself"
        )
    known = inspect.signature(registry.get(options.solver)).parameters
    given = {"seed": options.seed, "seconds": SECONDS}
    own = {k: v for k, v in given.items() if k in known}
    with context.progress(f"solving for {options.removal}", 0) as bar:
        spectrum = find(options.problem, options.solver, options.states, **own)
        bar.advance(0, f"lowest energy {spectrum.energies[0]:.4g}")
    spectrum.save(out)


def problem_of(inputs: Inputs, config: SearchOptions) -> Problem:
    """Make the constrained problem of one removal, with the main Hamiltonian of a run."""
    return Problem(
        inputs.read("energy", Hamiltonian.load), removal_rows(inputs.blocks, config)
    )


def read_energy(folder: Store) -> Hamiltonian:
    """Read the main energy of a run."""
    return folder.load(folder.path / "hamiltonian.safetensors", Hamiltonian.load)


Solve = TypeVar("Solve", bound=SolveOptions)


def with_solved(folder: Store, config: Solve) -> Solve:
    """Return the options, with those that the spectrum of their removal was solved with.

    Raises:
        StageFileError: no spectrum, or it was solved for another energy or budget.
    """
    file = require(folder, config, "spectrum.json")
    folder.check(file)
    made = folder.record(file).options.content()
    if any(made.get(k) != getattr(config, k) for k in ("remove", "budget", "seed")):
        raise _outdated_error(folder, config, Outdated(file, "options"))
    return config.replace(**{key: made[key] for key in SOLVING if key in made})


def require(folder: Store, config: SearchOptions, name: str) -> Path:
    """Return a file of an earlier stage of this removal; with an empty name, its folder.

    Raises:
        StageFileError: it is of an older energy or spectrum, or does not exist; the message names
            the first stage that is missing.
    """
    target = folder.target(config.removal)
    path = target / name
    if not path.exists():
        needed = (STAGES[stage] for stage in ("solve", "rank", "cut"))
        verb = next(
            stage.verb for stage in needed if not (target / stage.file).exists()
        )
        raise StageFileError(
            f"{path} does not exist; first type: isingcut {verb} {_select(folder, config)}"
        )
    if outdated := folder.find_outdated(path):
        raise _outdated_error(folder, config, outdated)
    return path


def _select(folder: Store, config: SearchOptions) -> str:
    """Return the arguments that select a removal of a run."""
    flag = "--remove" if config.remove else "--budget"
    return shlex.join([str(folder.path), flag, config.removal])


def _outdated_error(
    folder: Store, config: SearchOptions, outdated: Outdated
) -> StageFileError:
    return StageFileError(
        f"{outdated.file} was made before the {outdated.value} changed; "
        f"{outdated.remedy(_select(folder, config))}"
    )


load_candidates = partial(read_document, model=CandidatesFile)
"""Reads the ranking in a `candidates.json`."""


def read_ranking(folder: Store, config: SearchOptions) -> CandidatesFile:
    """Read the ranking of one removal.

    Raises:
        StageFileError: as `require`.
    """
    return folder.load(require(folder, config, "candidates.json"), load_candidates)


def chosen_blocks(folder: Store, config: SearchOptions) -> list[int]:
    """Return the blocks that the ranking of one removal chose."""
    return read_ranking(folder, config).chosen.removed


def report(folder: Store, target: Path) -> Path:
    """Run stage `report`: write `report.html`, `.md` and `.json` of the removal in ``target``."""
    with folder.lock():
        write_report(folder, target)
    return target / "report.md"
