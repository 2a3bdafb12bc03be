"""How a stage runs: once for its options, resumed, checked, and recorded in `run.json`.

    Stage(runner, options)  ->  its record is compared  ->  make(context, inputs, options, out)

`pipeline` lists all stages in their order, and `files.stages` declares what each depends on.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

from isingcut.console.progress import Progress, silent
from isingcut.errors import IsingcutError, OutputExistsError
from isingcut.files import ownership, runs, writing
from isingcut.files.stages import NUMERICS, STAGES, Declaration
from isingcut.files.store import Store
from isingcut.memory import exhausted_error, is_memory_exhausted
from isingcut.options.declaration import Only, options_of
from isingcut.options.machine import MachineOptions
from isingcut.processes import ALONE, Processes
from isingcut.runs.folder import each_removal, list_sources

if TYPE_CHECKING:
    from isingcut.options.config import RunConfig
    from isingcut.runs.context import Context

T = TypeVar("T")


@dataclass
class Estimate:
    """One line of a plan, memory in bytes; ``impossible`` is the reason if it cannot run."""

    name: str = ""
    samples: int = 0
    seconds: float = 0.0
    memory: float = 0.0
    impossible: str = ""


class NoModel(NamedTuple):
    """The context of stages that open no model."""

    progress: Progress = silent
    processes: Processes = ALONE


@dataclass(eq=False)
class Runner:
    """Runs stages: the folder of their results, and the context that they compute in.

    When memory runs out, a streamed context takes the place of the old one.
    """

    folder: Store
    context: Context

    @classmethod
    def of_files(cls, folder: Store, progress: Progress = silent) -> Runner:
        """Return the runner of stages that open no model."""
        return cls(folder, cast("Context", NoModel(progress)))

    def __post_init__(self) -> None:
        self.folder.processes = self.context.processes
        self.folder.progress = self.context.progress

    def run_alone(self) -> None:
        """Let each process work alone from now on."""
        self.context = self.context.alone()
        self.__post_init__()

    def make_room(self) -> bool:
        """Free memory by streaming the model; return False if that is impossible."""
        streamed = self.context.streamed()
        if streamed is None:
            return False
        # Nothing else may hold the old one.
        self.context = streamed
        streamed.release()
        return True


class Planned(NamedTuple):
    """What a stage is about to write.

    Args:
        file: its file or folder.
        values: what it is made from beside its results and options; those that the declaration
            names are recorded.
        config: the options, if others than those of the call.
    """

    file: Path
    values: Mapping[str, Any] = MappingProxyType({})
    config: Any = None


@dataclass(frozen=True, eq=False)
class Inputs:
    """The results that a stage reads: those of its declaration.

    Args:
        file: the file or folder that the stage writes.
    """

    folder: Store
    stage: Stage[Any]
    file: Path

    @property
    def place(self) -> Path:
        """The folder with the file of the stage, for its journals."""
        return self.file.parent

    @property
    def blocks(self) -> runs.BlockList:
        """The blocks of the model."""
        return self.folder.run.blocks

    def find(self, name: str) -> Path:
        """Return the file or folder of a result, after a check that nothing else changed it."""
        if name not in self.stage.declared.reads:
            raise LookupError(
                f"the stage {self.stage.name} reads {name}, which it does not declare"
            )
        source = self.folder.find_source(self.file, name)
        self.folder.check(source)
        return source

    def read(self, name: str, load: Callable[[Path], T]) -> T:
        """Return a result, read by a function."""
        return load(self.find(name))


_JOURNAL = re.compile(r".+\.journal(\.\d+)?")
_FINGERPRINT = re.compile("[0-9a-f]{16}|[0-9a-f]{64}")
_HOW = {f.name for f in fields(MachineOptions)} - {*NUMERICS}
"""Options of the model and of the machine, which no result depends on beyond rounding; another
model makes another run."""


@dataclass(frozen=True)
class Stage(Generic[T]):
    """A stage of a run; call it to get its result.

    Attributes:
        name: its name in `files.stages.STAGES` and in `run.json`.
        make: writes its result to a path. It gets the context, its inputs, and its options and
            values as attributes.
        load: reads its file or folder.
        plan: returns what it writes, and the values that it is made from; gets the runner, the
            options and the further arguments of the call. By default, the declared file.
        check: raises if it is impossible; gets the context, the options and the model's blocks,
            before a run writes its first file.
        choose: returns the blocks that a result chooses, which the record keeps.
        price: estimates its time and memory from `prices.Prices`, for `plan`; a line without a name
            gets that of the stage.
    """

    name: str
    make: Callable[[Context, Inputs, Any, Path], object]
    load: Callable[[Path], T]
    plan: Callable[..., Planned] | None = None
    check: Callable[[Context, Any, runs.BlockList], object] = lambda *_: None
    choose: Callable[[T], list[int] | None] = lambda result: None
    price: Callable[[Any], list[Estimate]] = lambda prices: []

    @property
    def declared(self) -> Declaration:
        """Its declaration."""
        return STAGES[self.name]

    def __call__(self, runner: Runner, config: Any, *given: Any) -> T:
        """Return the result; make it unless a result with the same options exists.

        Args:
            config: the options of a run; only the declared ones are read.
            given: further arguments of `plan`.

        Raises:
            OutputExistsError: it was made with other options, and overwriting was not allowed.
            StageFileError: the file was changed later, or is damaged.
            BusyError: the stage must run, and another process writes to the folder.
            ModelError: the model's weights changed meanwhile.
        """
        folder = runner.folder
        processes = folder.processes
        place = folder.path if self.declared.of_run else folder.target(config.removal)
        planned = Planned(place / self.declared.main)
        if self.plan is not None:
            planned = self.plan(runner, config, *given)
            config = planned.config or config
        file = planned.file
        if processes.rank:
            if processes.decide(bool):
                with tempfile.TemporaryDirectory() as aside:
                    self._make(runner, config, planned, Path(aside) / file.name)
            folder.share()
            return folder.load(file, self.load)
        ownership.refuse_source(file, list_sources(folder))
        options = self._options(runner, config, planned)
        made = folder.is_made(file, options)
        with contextlib.nullcontext() if made else folder.lock():
            # Another process may have finished it meanwhile.
            if folder.is_made(file, options):
                if writing.is_locked(folder.path):
                    # Left by a kill right after the record was written.
                    self._forget(file)
                processes.decide(bool)
                folder.share()
                return folder.load(file, self.load)
            before = folder.find_record(file)
            if os.path.lexists(file):
                self._refuse_replacing(folder, file, before, options)
            key = folder.key(file)
            begun = folder.run.stages[key] = runs.StageRecord(
                stage=self.name,
                fingerprint=folder.fingerprint(options),
                options=runs.StageOptions(**options),
                done=False,
            )
            folder.save()
            began = time.monotonic()
            processes.decide(lambda: self.declared.together)
            try:
                self._make(runner, config, planned, file)
                try:
                    if self.declared.model:
                        runner.context.check_model()
                except IsingcutError:
                    writing.delete(file)
                    self._forget(file)
                    raise
            except BaseException as e:
                if before is None:
                    if isinstance(e, IsingcutError):
                        del folder.run.stages[key]
                elif (
                    before.done
                    and os.path.lexists(file)
                    and ownership.find_change_since(file, before) is None
                ):
                    folder.run.stages[key] = before
                folder.save()
                raise
            begun.seconds = round(time.monotonic() - began, 3)
            if file.is_dir():
                begun.sha256 = ownership.folder_hash(file)
            else:
                begun.sha256 = ownership.file_sha256(file, folder.progress)
            if self.declared.model and runner.context.streaming:
                begun.streamed = True
            result = self.load(file)
            begun.chosen = self.choose(result)
            begun.done = True
            folder.save()
            folder.share()
            self._forget(file)
            return result

    def _options(self, runner: Runner, config: Any, planned: Planned) -> dict[str, Any]:
        """Return everything that the result depends on, by the names of the declaration."""
        declared = self.declared
        folder = runner.folder
        found = {name: getattr(config, name) for name in options_of(config, self.name)}
        unused = declared.unused({**found, **planned.values})
        found |= {name: planned.values[name] for name in declared.values}
        if declared.numerics:
            found |= runner.context.numerics
        for name in declared.reads:
            if name != "choice" and name not in unused:
                source = folder.find_source(planned.file, name)
                key = "model" if name == "product" else name
                found[key] = folder.record(source).fingerprint
        return {name: value for name, value in found.items() if name not in unused}

    def _make(self, runner: Runner, config: Any, planned: Planned, out: Path) -> None:
        """Write the result to ``out``; if memory runs out and some can be freed, make it again.

        Raises:
            MemoryExhaustedError: memory ran out, and none can be freed.
        """
        names = _HOW | {*options_of(config, self.name)}
        if self.declared.numerics:
            names |= {*NUMERICS}
        reader = f"the stage {self.name}"
        options = Only(config, names, reader, **planned.values)
        inputs = Inputs(runner.folder, self, planned.file)
        while True:
            context: Any = runner.context
            try:
                if not self.declared.model:
                    context = Only(context, {"progress"}, reader)
                elif self.declared.together or context.processes.size == 1:
                    # All processes choose the micro-batch together, for the loaded model.
                    runner.folder.keep_tuning(context.tuned)
                self.make(context, inputs, options, out)
                return
            except Exception as error:
                if not is_memory_exhausted(error):
                    raise
                exhausted = exhausted_error(error)
            # Not inside the except block: the error keeps frames with tensors alive.
            del context
            if not runner.make_room():
                raise exhausted

    def _forget(self, file: Path) -> None:
        """Delete the journals of all processes, and a folder for journals that is empty then."""
        for pattern in self.declared.journals:
            name = pattern.format(glob.escape(file.name))
            for path in file.parent.glob(f"{name}*"):
                if _JOURNAL.fullmatch(path.name):
                    path.unlink(missing_ok=True)
                    with contextlib.suppress(OSError):
                        path.parent.rmdir()

    def _refuse_replacing(
        self,
        folder: Store,
        file: Path,
        before: runs.StageRecord | None,
        options: dict[str, Any],
    ) -> None:
        """Raise if the stage may not replace its file."""
        if before is None:
            raise OutputExistsError(
                f"{file} was not written by this run and is not replaced; move it away"
            )
        made = before.options.content()
        additions = self.declared.additions
        others = {*made, *options} - {*additions}
        only_added = (
            before.fingerprint
            and additions
            and all(made.get(key) == options.get(key) for key in others)
            and all(
                made[key].items() <= options[key].items()
                for key in additions
                if isinstance(made.get(key), dict)
            )
        )
        fits = only_added or before.fingerprint == folder.fingerprint(options)
        if not (fits or folder.overwrite):
            raise _changed_error(file, _list_changes(made, options))
        changed = ownership.find_change_since(file, before, folder.progress)
        if changed is not None:
            raise OutputExistsError(
                f"{file} is not replaced: {changed} after the run wrote it; --overwrite "
                "replaces only files of isingcut; move it away"
            )
        if file.is_dir():
            ownership.check_output(file, overwrite=True)


def stage(
    name: str, load: Callable[[Path], T], **further: Any
) -> Callable[[Callable[[Context, Inputs, Any, Path], object]], Stage[T]]:
    """Bind the decorated function to the declaration of a stage; arguments as of `Stage`."""
    return lambda make: Stage(name, make, load, **further)


def refuse_changes(folder: Store, config: RunConfig, *, ranks: bool) -> None:
    """Raise if a whole job with these options would be refused by a file of a finished stage.

    Args:
        ranks: whether the job ranks removals, or measures the energy only.

    Raises:
        OutputExistsError: an option has changed; the message has its old and new value.
    """
    if folder.overwrite:
        return
    # A model has no more removals than blocks, which is checked later.
    ranks &= max(config.remove.counts, default=0) < len(folder.run.blocks.blocks)
    for one in each_removal(config) if ranks else [config]:
        for stage_name, stage in STAGES.items():
            place = folder.path if stage.of_run else folder.target(one.removal)
            record = folder.find_finished(file := place / stage.main)
            if record is None or not (ranks or stage.of_run):
                continue
            made = record.options.content()
            own = config if stage.of_run else one
            typed = {*options_of(own, stage_name), *({"energy"} & {*stage.values})}
            names = typed & made.keys()
            now = {name: getattr(own, name) for name in names}
            if lines := _list_changes({k: made[k] for k in now}, now):
                raise _changed_error(file, lines)


def _changed_error(file: Path, changes: Sequence[str]) -> OutputExistsError:
    untyped = "the model or the energy's options differ"
    return OutputExistsError(
        f"{file} was made with other options ({'; '.join(changes) or untyped}); "
        "choose another --out, or pass --overwrite to replace it"
    )


def _list_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describe the options that differ, each as ``remove: was 4, now 5``."""
    changes = []
    for key in dict.fromkeys([*now, *before]):
        old = before.get(key)
        new = now.get(key)
        # They have what is typed for an energy.
        if old == new or key in ("settings", "named"):
            continue
        if isinstance(old, dict) or isinstance(new, dict):
            changes += [
                f"{key}: {line}" for line in _list_changes(old or {}, new or {})
            ]
        elif all(x is None or _FINGERPRINT.fullmatch(str(x)) for x in (old, new)):
            changes.append(f"the {'checkpoint' if key == 'model' else key} changed")
        else:
            changes.append(f"{key}: was {_in_words(old)}, now {_in_words(new)}")
    return changes


def _in_words(value: Any) -> str:
    if isinstance(value, list | tuple):
        value = ", ".join(map(str, value))
    return "none" if value is None else str(value) or "none"
