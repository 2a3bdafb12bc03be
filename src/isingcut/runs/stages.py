"""How a stage runs: once for its options, resumed, checked, and recorded in `run.json`.

`pipeline` lists all stages in their order, and `files.stages` has what each file depends on.
"""

import contextlib
import glob
import os
import re
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

from isingcut.errors import IsingcutError, OutputExistsError
from isingcut.files import ownership, runs, writing
from isingcut.files.stages import STAGES, Declaration
from isingcut.memory import exhausted_error, is_memory_exhausted
from isingcut.options.config import RunConfig
from isingcut.runs.folder import RunFolder, each_removal

P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Estimate:
    """One line of a plan, memory in bytes; ``impossible`` is the reason if it cannot run."""

    name: str = ""
    samples: int = 0
    seconds: float = 0.0
    memory: float = 0.0
    impossible: str = ""


Making = Generator[tuple[RunFolder, Path, dict[str, Any]], Path, None]
"""Yields the run, the file or folder that a stage writes there, and everything that the result
depends on; if the path to write to is sent back, makes the result there."""

_JOURNAL = re.compile(r".+\.journal(\.\d+)?")
_FINGERPRINT = re.compile("[0-9a-f]{16}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Stage(Generic[P, T]):
    """A stage of a run; call it to get its result.

    Attributes:
        name: its name in `files.stages.STAGES` and in `run.json`.
        make: makes its result for its arguments.
        load: reads its file or folder.
        check: raises if it is impossible; gets the session and the model's blocks, before a run
            writes its first file.
        choose: returns the blocks that a result chooses, which the record keeps.
        price: estimates its time and memory from `prices.Prices`, for `plan`; a line without a name
            gets that of the stage.
    """

    name: str
    make: Callable[P, Making]
    load: Callable[[Path], T]
    check: Callable[[Any, runs.BlockList], object] = lambda session, blocks: None
    choose: Callable[[T], list[int] | None] = lambda result: None
    price: Callable[[Any], list[Estimate]] = lambda prices: []

    @property
    def declared(self) -> Declaration:
        """Its declaration."""
        return STAGES[self.name]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        """Return the result; make it unless a result with the same options exists.

        Raises:
            OutputExistsError: it was made with other options, and overwriting was not allowed.
            StageFileError: the file was changed later, or is damaged.
            BusyError: the stage must run, and another process writes to the folder.
            ModelError: the model's weights changed meanwhile.
        """
        making = self.make(*args, **kwargs)
        folder, file, options = next(making)
        processes = folder.processes
        if processes.rank:
            if processes.decide(bool):
                with tempfile.TemporaryDirectory() as aside:
                    _is_done(making, Path(aside) / file.name, folder)
            folder.share()
            return folder.load(file, self.load)
        ownership.refuse_source(file, folder.sources)
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
            key = runs.stage_key(folder.path, file)
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
                while not _is_done(making, file, folder):
                    making = self.make(*args, **kwargs)
                    next(making)
                try:
                    if folder.session is not None:
                        folder.session.check_model()
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
            if folder.session is not None and folder.session.streaming:
                begun.streamed = True
            result = self.load(file)
            begun.chosen = self.choose(result)
            begun.done = True
            folder.save()
            folder.share()
            self._forget(file)
            return result

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
        folder: RunFolder,
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
) -> Callable[[Callable[P, Making]], Stage[P, T]]:
    """Bind the decorated function to the declaration of a stage; arguments as of `Stage`."""
    return lambda make: Stage(name, make, load, **further)


def _is_done(making: Making, file: Path, folder: RunFolder) -> bool:
    """Make a stage's file; return False if memory ran out and some could be freed.

    Raises:
        MemoryExhaustedError: memory ran out, and none can be freed.
    """
    try:
        with contextlib.suppress(StopIteration):
            making.send(file)
        return True
    except Exception as error:
        if not is_memory_exhausted(error):
            raise
        exhausted = exhausted_error(error)
    # Not inside the except block: the error keeps frames with tensors alive.
    if folder.session is None or not folder.session.make_room():
        raise exhausted
    return False


def typed_options(name: str, config: RunConfig) -> dict[str, Any]:
    """Return the options of a run that the record of a stage has as they were typed."""
    return {key: getattr(config, key) for key in STAGES[name].options}


def refuse_changes(folder: RunFolder, config: RunConfig, *, ranks: bool) -> None:
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
        for name, stage in STAGES.items():
            place = folder.path if stage.of_run else folder.target(one)
            record = folder.find_finished(file := place / stage.main)
            if record is None or not (ranks or stage.of_run):
                continue
            made = record.options.content()
            made |= made.pop("typed", {})
            typed = typed_options(name, config if stage.of_run else one)
            now = {k: v for k, v in typed.items() if k in made}
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
        # `refuse_changes` compares what is typed for an energy.
        if old == new or key in ("options", "typed"):
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
