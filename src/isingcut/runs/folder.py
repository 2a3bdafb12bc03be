"""Run folders: which stage wrote which file, with which options, and whether it is up to date.

    run.json                   options, provenance, blocks, and one record per finished stage
    calibration.safetensors    token splits
    hamiltonian.safetensors    the energy (others: hamiltonian.NAME.safetensors)
    spectrum.json              \\
    candidates.json             | of the run's own removal; another removal of the same
    model/, healed/             | Hamiltonian has them in a folder remove-SPEC/
    evaluation.json             |
    report.md, .json, .html    /
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from isingcut.console.printing import say
from isingcut.console.progress import Progress, silent
from isingcut.data.mixture import places_in
from isingcut.errors import (
    ModelError,
    OutputExistsError,
    StageFileError,
)
from isingcut.files import ownership, results, runs, writing
from isingcut.files.inputs import user_path
from isingcut.files.provenance import command_line, model_path, versions
from isingcut.files.stages import Outdated, find_outdated, is_made
from isingcut.formats.sources import list_differences, model_identity
from isingcut.options.config import RunConfig
from isingcut.options.declaration import options_from
from isingcut.options.search import Search, SearchOptions
from isingcut.processes import ALONE, Processes

T = TypeVar("T")

MANIFEST = "run.json"

# Options of one command only. Trust is given on each command line, because another person may open
# the folder.
_NOT_KEPT = ("out", "overwrite", "trust_remote_code")


@dataclasses.dataclass(eq=False)
class RunFolder:
    """The files of one run, and the stages that write them; use `create_or_open` or `open`.

    Args:
        path: the run folder.
        run: the content of run.json.
        overwrite: allow replacing results that were made with other options.

    Attributes:
        typed_solver: the solver given now, not read from run.json; only it may import third-party
            code.
        processes: the processes that run the stages together; only rank 0 writes.
        progress: shows the hashing of large files.
    """

    path: Path
    run: runs.RunFile
    overwrite: bool = False
    typed_solver: str | None = None
    processes: Processes = ALONE
    progress: Progress = silent

    @classmethod
    def create_or_open(
        cls, config: RunConfig, model: runs.ModelIdentity, blocks: runs.BlockList
    ) -> RunFolder:
        """Create the folder for a run of ``config``, or open an earlier one of the same model.

        Raises:
            OutputExistsError: ``out`` is something else, or a run of another model.
        """
        path = user_path(config.out)
        cls.refuse_foreign(config)
        kept = dataclasses.asdict(config)
        for name in _NOT_KEPT:
            del kept[name]
        options = runs.Config(**kept)
        now = {"model": model, **model_path(path, config.model)}
        if (path / MANIFEST).is_file():
            folder = cls.open(path, overwrite=config.overwrite)
            before = folder.run.provenance.model
            units = folder.config.units
            what = ""
            if changed := list_differences(before.content(), model.content()):
                what = f"{path} is a run of another model ({before.name}; different: {changed})"
            elif units != config.units:
                what = f"{path} is a run with --units {units}"
            if what:
                if not config.overwrite:
                    raise OutputExistsError(
                        f"{what}; choose another --out or pass --overwrite"
                    )
                say(f"isingcut: warning: {what}; everything is made again")
                # Keep the records, so that only recorded files may be replaced.
                for record in folder.run.stages.values():
                    record.fingerprint = ""
                    record.done = False
                folder.run.blocks = blocks
            if not folder.config.removal or config.overwrite:
                folder.run.config = options
            folder.run.provenance = runs.Provenance(
                **folder.run.provenance.content() | now
            )
        else:
            run = runs.RunFile(
                config=options,
                stages={},
                blocks=blocks,
                provenance=runs.Provenance(
                    **versions(), command_line=command_line(), **now
                ),
                complete=False,
            )
            folder = cls(path, run, config.overwrite)
        folder.typed_solver = config.solver
        folder.save()
        return folder

    @staticmethod
    def refuse_foreign(config: RunConfig) -> None:
        """Raise if ``out`` is not free for a run, or is among the inputs of the run.

        Raises:
            InputError: ``out`` is, contains or lies in the model, the text or a config file.
            OutputExistsError: ``out`` exists and is not a run folder.
        """
        path = user_path(config.out)
        ownership.refuse_source(path, read_by(config))
        if path.is_file():
            raise OutputExistsError(f"{path} is a file; choose a folder for --out")
        begun = path.is_dir() and all(map(writing.is_leftover, path.iterdir()))
        if path.exists() and not (path / MANIFEST).is_file() and not begun:
            raise OutputExistsError(
                f"{path} already exists and is not an isingcut run; nothing was written, and "
                "--overwrite replaces only files of isingcut: choose another --out"
            )

    @classmethod
    def open(cls, path: Path, *, overwrite: bool = False) -> RunFolder:
        """Open an existing run folder.

        Raises:
            StageFileError: run.json is missing or unreadable.
        """
        if not (path / MANIFEST).is_file():
            raise StageFileError(
                f"{path} is not an isingcut run folder (no {MANIFEST} in it); "
                "give the --out of a run, or make one with: isingcut run MODEL --remove M"
            )
        run = results.read_document(path / MANIFEST, runs.RunFile)
        return cls(path, run, overwrite)

    @property
    def config(self) -> RunConfig:
        """The options the folder was made with."""
        stored = self.run.config.content()
        # It is never stored, but another person may have edited the file.
        stored.pop("trust_remote_code", None)
        # What it sets is stored; it must not replace an option that is typed now.
        stored.pop("quick", None)
        options = options_from(RunConfig, stored, str(self.path / MANIFEST))
        return options.replace(out=str(self.path))

    @property
    def sources(self) -> list[Path]:
        """The inputs of the run on this machine."""
        inputs = read_by(self.config)
        if seen := self.run.provenance.model_path:
            inputs += [self.path / seen.absolute, self.path / seen.relative]
        return inputs

    def model_places(self, name: str) -> list[str]:
        """List possible places of the run's model: its name, or its path relative to this folder.

        Args:
            name: the model's current name; a name other than the run's own is used as it is.

        Raises:
            ModelError: it was a local model, and is in none of these places.
        """
        places = self.run.provenance.model_path
        if places is None or name != self.run.config.model:
            return [name]
        seen = dict.fromkeys([name, places.absolute, str(self.path / places.relative)])
        there = [place for place in seen if user_path(place).exists()]
        if not there:
            raise ModelError(
                f"the model of {self.path} is no longer at {', '.join(seen)}; give its place with "
                "--model"
            )
        return there

    def model_warnings(self) -> list[str]:
        """Return a warning if the run's model changed, unless its folder is not here."""
        made_with = self.run.provenance.model.content()
        places = [
            self.path / place for _, place in self.run.provenance.model_path or ()
        ]
        there = [place for place in places if (place / "config.json").is_file()]
        changed = [list_differences(made_with, model_identity(p)) for p in there]
        if not all(changed) or not changed:
            return []
        return [
            f"the model of {self.path} has changed since (different: {changed[0]}); these results "
            "are of the earlier version"
        ]

    def save(self) -> None:
        """Write run.json."""
        if not self.processes.rank:
            results.write_document(self.path / MANIFEST, self.run)

    def target(self, config: SearchOptions) -> Path:
        """Return the folder for the files of one removal: the run's own, or a sub-folder."""
        if config.removal == self.config.removal:
            return self.path
        return self.path / f"remove-{slug(config.removal)}"

    def check(self, file: Path) -> None:
        """Raise if a file or folder of a stage differs from what the run wrote.

        Raises:
            StageFileError: this run did not write it, or it was changed later.
        """
        ownership.check_recorded(self.find_record(file), file, self.progress)

    def load(self, file: Path, read: Callable[[Path], T]) -> T:
        """Read the file or folder of a finished stage, after `check`.

        All files of a run are read through this method.
        """
        self.check(file)
        return read(file)

    def find_record(self, file: Path) -> runs.StageRecord | None:
        """Return the record of the stage that writes a file or folder; None if it never began."""
        return self.run.find_record(self.path, file)

    def find_finished(self, file: Path) -> runs.StageRecord | None:
        """Return the record of the stage that wrote a file or folder; None if unfinished."""
        record = self.find_record(file)
        return record if record and record.done and os.path.lexists(file) else None

    def record(self, file: Path) -> runs.StageRecord:
        """Return the record of the finished stage that wrote a file or folder.

        Raises:
            StageFileError: no finished stage wrote it.
        """
        record = self.find_finished(file)
        if record is None:
            raise StageFileError(
                f"{file} is not finished; type the command that began it again"
            )
        return record

    def find_outdated(self, file: Path) -> Outdated | None:
        """Return which result was made from an earlier value: a stage's file, or what it read."""
        return find_outdated(self.run, self.path, file)

    def is_made(self, file: Path, options: dict[str, Any]) -> bool:
        """Whether a stage's file exists, is finished, and was made with these options."""
        record = self.find_record(file)
        now = self.fingerprint(options)
        return bool(record and record.done and is_made(file, record.fingerprint, now))

    def fingerprint(self, options: dict[str, Any]) -> str:
        """Return the fingerprint of a stage's options and of the original model."""
        # `options["model"]` is the fingerprint of the cut checkpoint that a stage reads.
        read = options | {"original": self.run.provenance.model.sha256}
        read.pop("named", None)
        return results.fingerprint(read)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the folder for writing, and read run.json again.

        Raises:
            BusyError: another process writes there.
        """
        with writing.lock_place(self.path, inside=True) as first:
            if first:
                self.run = results.read_document(self.path / MANIFEST, runs.RunFile)
            yield

    def keep_tuning(self, tuned: Mapping[str, runs.Computed]) -> None:
        """Record the micro-batch of a device, so that a later call measures with the same."""
        made = self.run.provenance
        if not self.processes.rank and not tuned.items() <= made.computed.items():
            made.computed = {**made.computed, **tuned}
            self.save()

    def share(self) -> None:
        """Send rank 0's content of run.json to all processes."""
        content = self.processes.decide(self.run.content)
        self.run = runs.RunFile.model_validate(content)


def each_removal(config: Search) -> list[Search]:
    """Return the options of each removal: one per number of a range such as `4..15`."""
    if not config.remove.is_range:
        return [config]
    return [config.replace(remove=m) for m in config.remove.counts]


def read_by(config: RunConfig) -> list[Path]:
    """List the files and folders that a run with these options reads."""
    tasks = map(str.strip, config.tasks.split(","))
    files = [name for name in tasks if name.endswith(".jsonl")]
    named = [config.model, *places_in(config.calibration), config.data, *files]
    return list(filter(os.path.lexists, map(user_path, filter(None, named))))


def slug(remove: str) -> str:
    """Convert a removal to a folder name: ``attention=2,moe=3`` to ``attention-2_moe-3``."""
    return re.sub(r"[^\w.-]", "_", remove.replace("=", "-"))
