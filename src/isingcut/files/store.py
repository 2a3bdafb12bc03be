"""A folder of results: which stage wrote which file, from what, and whether it is up to date.

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

from isingcut.console.progress import Progress, silent
from isingcut.errors import StageFileError
from isingcut.files import ownership, results, runs, writing
from isingcut.files.stages import STAGES, Outdated, find_stage, is_made
from isingcut.processes import ALONE, Processes

T = TypeVar("T")

MANIFEST = "run.json"


@dataclasses.dataclass(eq=False)
class Store:
    """The results of a run, and their records.

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
    def open(cls, path: Path, *, overwrite: bool = False) -> Store:
        """Open an existing run folder.

        Raises:
            StageFileError: run.json is missing or unreadable.
        """
        if not cls.exists(path):
            raise StageFileError(
                f"{path} is not an isingcut run folder (no {MANIFEST} in it); "
                "give the --out of a run, or make one with: isingcut run MODEL --remove M"
            )
        run = results.read_document(path / MANIFEST, runs.RunFile)
        return cls(path, run, overwrite)

    @staticmethod
    def exists(path: Path) -> bool:
        """Whether a path is a run folder."""
        return (path / MANIFEST).is_file()

    def target(self, removal: str) -> Path:
        """Return the folder for the files of one removal: the run's own, or a sub-folder."""
        own = self.run.config
        if removal == (own.remove or own.budget):
            return self.path
        return self.path / f"remove-{slug(removal)}"

    # Records ------------------------------------------------------------------------------

    def save(self) -> None:
        """Write run.json."""
        if not self.processes.rank:
            results.write_document(self.path / MANIFEST, self.run)

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

    def share(self) -> None:
        """Send rank 0's content of run.json to all processes."""
        content = self.processes.decide(self.run.content)
        self.run = runs.RunFile.model_validate(content)

    def keep_tuning(self, tuned: Mapping[str, runs.Computed]) -> None:
        """Record the micro-batch of a device, so that a later call measures with the same."""
        made = self.run.provenance
        if not self.processes.rank and not tuned.items() <= made.computed.items():
            made.computed = {**made.computed, **tuned}
            self.save()

    def key(self, file: Path) -> str:
        """Return the key of a stage's file or folder among the ``stages`` of run.json."""
        return file.relative_to(self.path).as_posix()

    def find_record(self, file: Path) -> runs.StageRecord | None:
        """Return the record of the stage that writes a file or folder; None if it never began."""
        return self.run.stages.get(self.key(file))

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

    # Results ------------------------------------------------------------------------------

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

    def fingerprint(self, options: dict[str, Any]) -> str:
        """Return the fingerprint of a stage's options and of the original model."""
        # `options["model"]` is the fingerprint of the cut checkpoint that a stage reads.
        read = options | {"original": self.run.provenance.model.sha256}
        read.pop("named", None)
        return results.fingerprint(read)

    def is_made(self, file: Path, options: dict[str, Any]) -> bool:
        """Whether a stage's file exists, is finished, and was made with these options."""
        record = self.find_record(file)
        now = self.fingerprint(options)
        return bool(record and record.done and is_made(file, record.fingerprint, now))

    def find_source(self, file: Path, name: str) -> Path:
        """Return the file or folder that another one reads, by its name among the `reads`."""
        if name == "product":
            return self.find_product(file.parent)
        beside = {"spectrum": "solve", "choice": "rank", "model": "cut"}
        if name in beside:
            return file.with_name(STAGES[beside[name]].file)
        return self.path / STAGES[name].main

    def find_product(self, target: Path) -> Path:
        """Return the final checkpoint in the folder of a removal: the healed one of the current
        cut, else `model/`."""
        healed = target / STAGES["heal"].file
        made = self.find_record(healed)
        outdated = self.find_outdated(healed, ranked=False)
        current = made is not None and made.done and not outdated
        return healed if current else target / STAGES["cut"].file

    def find_outdated(self, file: Path, *, ranked: bool = True) -> Outdated | None:
        """Return which result was made from a value that is another one now: a file, or what it
        read.

        Args:
            file: a stage's file or folder.
            ranked: whether a cut is out of date if the ranking that chose its blocks is.

        Returns:
            None if it is up to date.
        """
        made = self.find_record(file)
        if made is None:
            return None
        read = made.options.content()
        for name in find_stage(file)[1].reads:
            if name == "choice" and made.options.named:
                continue
            source = self.find_source(file, name)
            now = self.find_record(source)
            if now is None:
                continue
            key = "model" if name == "product" else name
            if name == "choice":
                same = now.chosen in (None, made.options.removed)
            else:
                same = read.get(key) in (None, now.fingerprint)
            if not same:
                return Outdated(file, key)
            above = ranked or name != "choice"
            if above and (earlier := self.find_outdated(source, ranked=ranked)):
                return earlier
        return None


def slug(removal: str) -> str:
    """Convert a removal to a folder name: ``attention=2,moe=3`` to ``attention-2_moe-3``."""
    return re.sub(r"[^\w.-]", "_", removal.replace("=", "-"))
