"""`run` does the whole job, `energy` its first half; both check everything before they write.

text -> token batches -> Hamiltonian -> spectrum -> measured candidates
     -> exact cut -> patched checkpoint -> scores -> report
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from isingcut.console.progress import Progress, silent
from isingcut.data import corpora
from isingcut.errors import ArchitectureError, InputError, StageFileError
from isingcut.files.documents import CandidatesFile, RunFile
from isingcut.files.writing import locked, refuse_source
from isingcut.ising.solvers import registry as solvers
from isingcut.memory import convert_memory_errors
from isingcut.models.inspect import inspect_model
from isingcut.models.processes import ALONE, Processes
from isingcut.options.config import RunConfig
from isingcut.options.declaration import options_from
from isingcut.report.write import check_report
from isingcut.runs import healing
from isingcut.runs.cutting import make_model
from isingcut.runs.folder import MANIFEST, RunFolder
from isingcut.runs.measuring import (
    build_calibration,
    calibrate,
    concrete,
    energy_part,
    measure_energy,
    names,
)
from isingcut.runs.session import Session, part, take_up
from isingcut.runs.solving import (
    describe_blocks,
    each_removal,
    kept_and_dropped,
    removal_rows,
    report,
    solve,
)
from isingcut.runs.stages import check_asked, check_whole, data_of, evaluate, rank, score_tasks


@convert_memory_errors()
def run(config: RunConfig | None = None, /, *, progress: Progress = silent, **options: Any) -> Path:
    """Measure, solve, rank, cut, patch, evaluate and report: the whole job.

    Args:
        config: all options; or give them by name (`model`, `remove` and `out` at least).
        progress: where progress is shown, for example `isingcut.console.progress.terminal`.

    Returns:
        The run folder. Its `model/` is a plain Hugging Face checkpoint, the cut with its patch;
        for a range of removals there is none, only `remove-M/` with the ranking of each.

    Raises:
        IsingcutError: bad input, in one line; nothing was written.

    Examples:
        >>> folder = isingcut.run(
        ...     model="my-model", remove=3, out="whole-run", calibration="my-text.txt",
        ...     samples=4, length=16,
        ... )
        >>> (folder / "model" / "config.json").is_file()
        True
    """
    wanted = checked(config, options, "isingcut.run")
    processes = Processes.join()
    with open_session(wanted, progress, processes, need_removal=True) as (session, folder):
        several = each_removal(wanted)
        target = folder.path if len(several) > 1 else folder.target(wanted.removal)
        if target == folder.path:
            folder.run.complete = False
        measure_and_rank(session, folder)
        if not processes.rank:
            _finish(session, folder, several)
        processes.wait()
    return target


def measure_and_rank(session: Session, folder: RunFolder) -> list[CandidatesFile]:
    """The rankings of all removals that the options ask for, made by all processes."""
    measure_energy(session, folder)
    rankings = [solve_and_rank(session.at(one), folder) for one in each_removal(session.config)]
    part(session, folder)
    return rankings


def solve_and_rank(session: Session, folder: RunFolder) -> CandidatesFile:
    """The content of `candidates.json` for the removal of the session's options."""
    solve(folder, session.config)
    return rank(session, folder)


def cut_and_heal(session: Session, folder: RunFolder) -> Path:
    """The final checkpoint in the run folder, patched and healed where the options say so."""
    model = make_model(session, folder)
    return healing.heal(session, folder) or model


def _finish(session: Session, folder: RunFolder, several: Sequence[RunConfig]) -> None:
    """Cut, heal, evaluate and report; of a range no checkpoint is cut, the user picks one."""
    if len(several) == 1:
        cut_and_heal(session, folder)
        evaluate(session, folder)
        score_tasks(session, folder)
    for config in several:
        report(folder, config.removal)
    if len(several) > 1 or folder.target(several[0].removal) == folder.path:
        folder.run.complete = True
        folder.save()


@convert_memory_errors()
def energy(
    config: RunConfig | None = None, /, *, progress: Progress = silent, **options: Any
) -> Path:
    """Measure the Hamiltonian only; it answers every removal later.

    Returns:
        The run folder.

    Examples:
        >>> folder = isingcut.energy(
        ...     model="my-model", out="energy-only", calibration="my-text.txt", samples=4, length=16
        ... )
        >>> isingcut.open_run(folder, remove=2).spectrum.unit
        'nats/token'
    """
    wanted = checked(config, options, "isingcut.energy")
    processes = Processes.join()
    with open_session(wanted, progress, processes, need_removal=False) as (session, folder):
        measure_energy(session, folder)
    return folder.path


def checked(config: RunConfig | None, options: Mapping[str, Any], source: str) -> RunConfig:
    """The options of a whole job, given as a `RunConfig` or by name, with all that it needs.

    Args:
        source: the call that they were given in, for messages.
    """
    if config is not None and (options or not isinstance(config, RunConfig)):
        raise InputError("give either a RunConfig or options by name (model=...), not both")
    config = (config or options_from(RunConfig, options, source)).validate()
    if not config.out:
        raise InputError("--out was not given; name a folder for the run")
    return concrete(config)


@contextlib.contextmanager
def open_session(
    config: RunConfig, progress: Progress, processes: Processes, *, need_removal: bool
) -> Iterator[tuple[Session, RunFolder]]:
    """Check everything that can be wrong before the first file is written, as the only writer.

    Raises:
        BusyError: another process writes to the run folder.
    """
    if processes.rank:
        yield _follow(config, progress, processes)
        return
    out = Path(config.out)
    energy_part(config, config.energy)
    for name in names(config.also):
        energy_part(config, name)
    solvers.check(config.solver)
    healing.check_options(config)
    tasks = check_asked(config)
    # Before any model is loaded.
    RunFolder.refuse_foreign(out, config)
    if not (out / MANIFEST).is_file():
        # Before a file of ours is open, which may get the number of a pipe that is gone.
        corpora.check(config.calibration)
    with locked(out, inside=True):
        yield _lead(config, progress, processes, tasks, need_removal=need_removal)


def _lead(
    config: RunConfig,
    progress: Progress,
    processes: Processes,
    tasks: Sequence[str],
    *,
    need_removal: bool,
) -> tuple[Session, RunFolder]:
    """The checks that read the run folder, the model and the text; then both are ready."""
    out = Path(config.out)
    before = RunFolder.open(out) if (out / MANIFEST).is_file() else None
    if before is not None:
        before.model_places(config.model)
    if need_removal:
        for one in each_removal(config):
            check_report(out if before is None else before.target(one.removal))
    session = Session(config, progress, before.run.provenance.dtype if before else None)
    refuse_source(out, [session.source])
    check_whole(session, tasks, data_of(config), config.questions)
    check_by_config(session.source, config, needed=need_removal)
    take_up(session, processes)
    blocks = session.describe_blocks()
    if need_removal or config.removal:
        for one in each_removal(config):
            removal_rows(blocks, one)
    if need_removal:
        healing.check(session)
    calibration = build_calibration(session) if before is None else None
    folder = RunFolder.create_or_open(out, config, session.identity, blocks)
    if config.dtype == "auto" and folder.run.provenance.dtype is None:
        folder.run.provenance.dtype = session.dtype
        folder.save()
    folder.processes = processes
    session.serve(folder)
    folder.share()
    calibrate(session, folder, calibration)
    return session, folder


def _follow(
    config: RunConfig, progress: Progress, processes: Processes
) -> tuple[Session, RunFolder]:
    """The same in a process other than rank 0, which has checked everything."""
    session = Session(config, progress)
    take_up(session, processes)
    # Loaded while rank 0 makes the folder.
    _ = session.replay
    folder = RunFolder(Path(config.out), RunFile.model_validate(processes.decide(dict)))
    if not folder.path.is_dir():
        raise InputError(
            f"{folder.path} is not seen from here; name an --out that all machines share"
        )
    folder.processes = processes
    calibrate(session, folder, None)
    return session, folder


def check_by_config(folder: Path, config: RunConfig, *, needed: bool) -> None:
    """Refuse what a model's configuration already rules out, before its weights are read.

    Args:
        folder: the model's, as `resolve` gives it.
        needed: a removal has to be given.

    Raises:
        ArchitectureError: no state of this model can be cut.
        InputError: an impossible removal, a block that the model does not have, or samples that
            are longer than its positions.
        InfeasibleError: the constraints clash, as far as they are known without the weights.
    """
    found = inspect_model(folder, trust_remote_code=config.trust_remote_code)
    if found.refusal:
        raise ArchitectureError(found.refusal)
    if needed or config.removal:
        blocks = describe_blocks(found.stack, found.rows, found.parameters, 0)
        several = each_removal(config)
        # A range that is too long is refused by its end, not after solving for all before it.
        for one in several[-1:] + several[:-1]:
            removal_rows(blocks, one, early=True)
    else:
        kept_and_dropped(len(found.stack), config)
    if found.positions is not None and config.length > found.positions:
        raise InputError(
            f"--length {config.length} is more than the {found.positions} positions this model has"
        )


def session_of(
    folder: RunFolder, config: RunConfig, progress: Progress = silent, processes: Processes = ALONE
) -> Session:
    """A session on the model that a run folder was made with.

    Args:
        processes: that take it up together.

    Raises:
        ModelError: it is not there any more.
        StageFileError: the model found under that name is another one now.
    """
    folder.processes = processes
    folder.share()
    made_with = folder.run.provenance.model
    for place in folder.model_places(config.model):
        session = Session(config.replace(model=place), progress, folder.run.provenance.dtype)
        if session.identity.sha256 == made_with.sha256:
            break
    else:
        raise StageFileError(
            f"{folder.path} was made with another version of {made_with.name!r} than is at "
            f"{place}; name the one it was made with with --model, or start a new run folder"
        )
    session.serve(folder)
    take_up(session, processes)
    return session
