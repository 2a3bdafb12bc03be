"""What a run may remove, and the stages that need files of the run folder only: `solve`, `report`.

Count, budgets, blocks kept and dropped and legality are linear rows. Nothing here loads torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from isingcut.errors import InfeasibleError, InputError, StageFileError
from isingcut.files.documents import BlockCosts, BlockList, CandidatesFile, LegalityRow
from isingcut.files.writing import read_document
from isingcut.ising import constraints as rows
from isingcut.ising.constraints import LinearConstraint
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import imports, registry
from isingcut.ising.solvers import solve as find
from isingcut.ising.spectrum import Spectrum
from isingcut.options.config import RunConfig
from isingcut.options.spellings import Budget, Removal
from isingcut.report.write import write_report
from isingcut.runs.folder import RunFolder

if TYPE_CHECKING:
    from isingcut.models.architectures.blocks import BlockStack


def each_removal(config: RunConfig) -> list[RunConfig]:
    """The options of each removal: themselves, or one a number of a range such as `4..15`."""
    counts = config.remove.counts
    return [config] if len(counts) < 2 else [config.replace(remove=m) for m in counts]


def removal_rows(
    blocks: BlockList, config: RunConfig, *, early: bool = False
) -> list[LinearConstraint]:
    """All constraints of one removal, for the blocks that `run.json` describes.

    Args:
        early: the blocks are known from the model's configuration only; budgets of what depends
            on its weights or on this machine are left to the call that knows them.

    Raises:
        InputError: an option cannot be read, or no block or every block would go.
        InfeasibleError: the constraints clash; the message names them, and the largest budgets.
    """
    if len(each_removal(config)) > 1:
        raise InputError(
            f"--remove {config.remove} is a range, which only `run` and the search take; "
            "give one number here"
        )
    kinds = [b.kind for b in blocks.blocks]
    n = len(kinds)
    if n == 1:
        raise InputError("this model has one block, which stays: none can be removed")
    if config.remove or not config.budget:
        counts = count_rows(kinds, config.remove)
    else:
        most = np.ones(n)
        counts = [LinearConstraint("some stay", most, "<=", n - 1, "not every block goes")]
    others = kept_and_dropped(n, config)
    others += [LinearConstraint(**dict(row)) for row in blocks.legality]
    budgets = [b for b in config.budget.parts if b.quantity.early or not early]
    bounds = [budget_row(blocks, b) for b in budgets]
    plain = Problem(Hamiltonian(np.zeros(n), np.zeros((n, n))), [*counts, *others])
    try:
        plain.with_constraints(bounds).check()
    except InfeasibleError as e:
        plain.check()
        pairs = zip(bounds, budgets, strict=True)
        each = [_largest(plain, row, b) for row, b in pairs if row.rhs > 0]
        alone = "each alone " if len(each) > 1 else ""
        raise InfeasibleError(f"{e}; the largest possible {alone}is {', '.join(each)}") from e
    return [*counts, *bounds, *others]


def kept_and_dropped(n: int, config: RunConfig) -> list[LinearConstraint]:
    """The rows of `keep` and `drop`.

    Raises:
        InputError: a block that a model of ``n`` blocks does not have.
    """
    return [*rows.keep(n, config.keep.numbers), *rows.drop(n, config.drop.numbers)]


def budget_row(blocks: BlockList, wanted: Budget) -> LinearConstraint:
    """One `--budget`: at least this much of a quantity is removed."""
    quantity = wanted.quantity
    costs = [getattr(b, quantity.cost) for b in blocks.blocks]
    total = float(getattr(blocks, quantity.whole)) if quantity.whole else float(sum(costs))
    return rows.budget(wanted.name, costs, share=wanted.share, amount=wanted.amount, total=total)


def _largest(problem: Problem, row: LinearConstraint, budget: Budget) -> str:
    """The most of one budget that a state of the problem removes, as it can be typed."""
    costs = row.coefficients
    # An energy that falls with what is removed: its lowest state removes the most.
    falling = Hamiltonian(-costs, np.zeros((problem.n, problem.n)))
    most = float(costs @ Problem(falling, problem.constraints).a_state())
    if budget.share is not None:
        # Rounded down, so that what is said can be had.
        return f"{budget.name}={math.floor(1000 * most * budget.share / row.rhs) / 10:g}%"
    unit = budget.quantity.unit
    amount = math.floor(1e6 * most / budget.quantity.units[unit.lower()]) / 1e6
    return f"{budget.name}={amount:.12g}{unit}"


def count_rows(kinds: Sequence[str], remove: Removal) -> list[LinearConstraint]:
    """How many blocks go, in all or per kind."""
    n = len(kinds)
    if not remove:
        raise InputError(
            f"--remove was not given; say how many of the {n} blocks to remove, or give a --budget"
        )
    if remove.counts:
        if remove.counts[0] >= n:
            raise InputError(
                f"--remove must be from 1 to {n - 1} for this model of {n} blocks, got {remove}"
            )
        return [rows.count(n, remove.counts[0])]
    if (total := sum(remove.kinds.values())) >= n:
        raise InputError(
            f"--remove must name 1 to {n - 1} blocks in all for this model of {n} blocks, "
            f"got {total} ({remove})"
        )
    return rows.kind_counts(kinds, remove.kinds)


def describe_blocks(
    stack: BlockStack,
    legal: Iterable[LinearConstraint],
    parameters: int,
    size: int,
    seconds: Sequence[float] = (),
) -> BlockList:
    """Blocks and legality rows as `run.json` keeps them, so that solving needs no model.

    Args:
        parameters: of the whole model; ``size`` its bytes, 0 where they are not known.
        seconds: of each block for a token, where they were timed.
    """
    times: Sequence[float | None] = seconds or [None] * len(stack)
    return BlockList(
        path=stack.path,
        blocks=[
            BlockCosts(**vars(block), latency_seconds=time)
            for block, time in zip(stack.blocks, times, strict=True)
        ],
        total_parameters=parameters,
        total_bytes=size,
        legality=[
            LegalityRow(**{**vars(row), "coefficients": row.coefficients.tolist()}) for row in legal
        ],
    )


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
    return Problem(hamiltonian, removal_rows(folder.run.blocks, config))


def _solver_options(config: RunConfig) -> dict[str, Any]:
    """Seed and time limit, for a solver that has such options."""
    part = registry.get(config.solver)
    fields = {f.name for f in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else set()
    given = {"seed": config.seed, "seconds": config.solve_seconds}
    return {k: v for k, v in given.items() if k in fields}


def solve_options(folder: RunFolder, config: RunConfig) -> dict[str, Any]:
    record = folder.recorded(folder.path / "hamiltonian.safetensors")
    if record is None or not record.done:
        raise StageFileError(
            f"the energy of {folder.path} is not finished; "
            f"run: isingcut energy MODEL --out {folder.path}"
        )
    keys = ("remove", "budget", "keep", "drop", "solver", "states", "diverse", "seed")
    return {"energy": record.fingerprint} | {k: getattr(config, k) for k in keys}


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
