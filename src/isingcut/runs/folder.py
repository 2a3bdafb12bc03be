"""A run folder: which stage wrote which file, with which options, and whether it still fits.

    run.json                   options, provenance, blocks, and one record per finished stage
    calibration.safetensors    token splits
    hamiltonian.safetensors    the energy (others: hamiltonian.NAME.safetensors)
    spectrum.json              \\
    candidates.json             | of the run's own removal; another removal of the same
    model/, cut/, healed/       | Hamiltonian has them in a folder remove-SPEC/
    evaluation.json             |
    report.md, .json, .html    /
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from isingcut.errors import IsingcutError, OutputExistsError, StageFileError
from isingcut.files.locks import is_locked, locked
from isingcut.files.outputs import (
    changed_since,
    check_output,
    file_sha256,
    folder_hash,
    foreign_in,
    refuse_source,
)
from isingcut.files.provenance import model_path, versions
from isingcut.files.writing import delete, is_leftover, read_json
from isingcut.memory import exhausted_error, is_memory_exhausted
from isingcut.options.config import RunConfig
from isingcut.runs.manifest import MANIFEST, Manifest, kept, read_by

T = TypeVar("T")


class RunFolder(Manifest):
    """The files of one run, and the stages that write them; `create_or_open` or `open` one."""

    @classmethod
    def create_or_open(
        cls, path: Path, config: RunConfig, model: dict[str, Any], blocks: dict[str, Any]
    ) -> RunFolder:
        """The folder for a run of ``config``: new, or an earlier one of the same model.

        Raises:
            OutputExistsError: something else is at ``path``, or a run of another model.
        """
        cls.refuse_foreign(path, config)
        if (path / MANIFEST).is_file():
            folder = cls.open(path, overwrite=config.overwrite)
            before = folder.manifest["provenance"]["model"]
            if before["sha256"] != model["sha256"] and not config.overwrite:
                raise OutputExistsError(
                    f"{path} holds a run of another model ({before['name']}); "
                    "choose another --out or pass --overwrite"
                )
            if before["sha256"] != model["sha256"]:
                # What was written stays known, so that it may be replaced, and nothing else.
                for record in folder.manifest["stages"].values():
                    record.update(fingerprint="", done=False)
                folder.manifest["blocks"] = blocks
            if not folder.config.removal or config.overwrite:
                folder.manifest["config"] = kept(config)
            folder.manifest["provenance"].update(model=model, **model_path(path, config.model))
            folder.typed_solver = config.solver
            folder.save()
            return folder
        manifest = {
            "config": kept(config),
            "stages": {},
            "blocks": blocks,
            "provenance": {**versions(), "model": model, **model_path(path, config.model)},
            "complete": False,
        }
        folder = cls(path, manifest, overwrite=config.overwrite)
        folder.typed_solver = config.solver
        folder.save()
        return folder

    @staticmethod
    def refuse_foreign(path: Path, config: RunConfig) -> None:
        """Refuse what is there and is no run folder, and a place among what the run reads.

        Raises:
            InputError: ``path`` is, contains or lies in the model, the text or a config file.
            OutputExistsError: something else is at ``path``.
        """
        refuse_source(path, read_by(config))
        if path.is_file():
            raise OutputExistsError(f"{path} is a file; choose a folder for --out")
        if path.exists() and not (path / MANIFEST).is_file() and not _begun(path):
            raise OutputExistsError(
                f"{path} already exists and is not an isingcut run; nothing was written, and "
                "--overwrite replaces only what isingcut wrote: choose another --out"
            )

    @classmethod
    def open(cls, path: Path, *, overwrite: bool = False) -> RunFolder:
        """An existing run folder.

        Raises:
            StageFileError: no run.json there, or not a readable one.
        """
        if not (path / MANIFEST).is_file():
            raise StageFileError(
                f"{path} is not an isingcut run folder (no {MANIFEST} in it); "
                "make one with: isingcut energy MODEL --out DIR"
            )
        manifest = read_json(path / MANIFEST, "run")
        return cls(path, manifest, overwrite=overwrite)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only process that writes to the folder; run.json is read again.

        Raises:
            BusyError: another process writes there.
        """
        with locked(self.path, inside=True) as first:
            if first:
                self.manifest = read_json(self.path / MANIFEST, "run")
            yield

    def stage(
        self,
        name: str,
        file: Path,
        options: dict[str, Any],
        make: Callable[[Path], None],
        load: Callable[[Path], T],
        *,
        completes: dict[str, Any] | None = None,
        together: bool = False,
        forget: Callable[[], None] = lambda: None,
    ) -> T:
        """The result of a stage: what is there, if made with the same options; else made now.

        Args:
            completes: a result made with these options may be replaced: the new one holds all of
                it.
            together: all processes take part in making it, else rank 0 does alone.
            forget: deletes what an interrupted stage goes on from; called once the result is
                recorded, as a kill before that would cost all of it.

        Raises:
            OutputExistsError: made with other options, and overwriting was not allowed.
            StageFileError: the file was changed since, or is damaged.
            BusyError: it is to be made, and another process writes to the folder.
            ModelError: the model's weights were changed meanwhile.
        """
        if self.processes.rank:
            return self._follow(file, make, load)
        refuse_source(file, self.sources)
        made = self._is_made(file, options)
        with contextlib.nullcontext() if made else self.writing():
            # Another process may have made it meanwhile.
            if made or self._is_made(file, options):
                if is_locked(self.path):
                    # Of a kill right after the record.
                    forget()
                self.processes.decide(lambda: False)
                self.processes.decide(lambda: self.manifest)
                return self.load(file, load)
            key = str(file.relative_to(self.path))
            wanted = self._fingerprint(options)
            record = self.manifest["stages"].get(key)
            if os.path.lexists(file):
                if record is None:
                    raise OutputExistsError(
                        f"{file} was not written by this run and stays as it is; move it away"
                    )
                fits = [wanted] if completes is None else [wanted, self._fingerprint(completes)]
                if record["fingerprint"] not in fits and not self.overwrite:
                    raise OutputExistsError(
                        f"{file} was made with other options ({_difference(record, options)}); "
                        "choose another --out, or pass --overwrite to replace it"
                    )
                changed = changed_since(file, record)
                if changed is not None:
                    raise OutputExistsError(
                        f"{file} stays as it is: {changed} since the run wrote it, and --overwrite "
                        "replaces only what isingcut wrote; move it away"
                    )
                if file.is_dir():
                    check_output(file, overwrite=True)
            self.manifest["stages"][key] = {
                "stage": name,
                "fingerprint": wanted,
                "options": options,
                "done": False,
            }
            self.save()
            began = time.monotonic()
            self.processes.decide(lambda: together)
            try:
                while not self._make(make, file):
                    pass
                self._check_model(file, forget)
            except BaseException as e:
                self._give_up(key, file, record, refused=isinstance(e, IsingcutError))
                raise
            self.manifest["stages"][key].update(
                done=True,
                seconds=round(time.monotonic() - began, 3),
                **self.memory_record(),
                sha256=folder_hash(file) if file.is_dir() else file_sha256(file),
            )
            self.save()
            self.processes.decide(lambda: self.manifest)
            forget()
            return load(file)

    def _check_model(self, file: Path, forget: Callable[[], None]) -> None:
        """Keep nothing of a stage where the model's weights were changed meanwhile."""
        try:
            self.check_model()
        except IsingcutError:
            delete(file)
            forget()
            raise

    def _make(self, make: Callable[[Path], None], file: Path) -> bool:
        """Whether a stage's file was made; False where memory was used up and there is more now.

        Raises:
            MemoryExhaustedError: memory is used up, and nothing is left to give back.
        """
        try:
            make(file)
            return True
        except Exception as error:
            if not is_memory_exhausted(error):
                raise
            exhausted = exhausted_error(error)
        # Not while the error is handled: it keeps the frames that hold tensors.
        if not self.make_room():
            raise exhausted
        return False

    def drop(self, file: Path) -> None:
        """Delete a folder that a stage wrote, with its record; one that was changed since stays."""
        key = str(file.relative_to(self.path))
        if key not in self.manifest["stages"]:
            return
        if file.is_dir():
            if changed_since(file, self.manifest["stages"][key]) or foreign_in(file):
                return
            delete(file)
        del self.manifest["stages"][key]
        self.save()

    def _follow(self, file: Path, make: Callable[[Path], None], load: Callable[[Path], T]) -> T:
        """The result of a stage that rank 0 writes, and this process may take part in making."""
        if self.processes.decide(bool):
            with tempfile.TemporaryDirectory() as aside:
                make(Path(aside) / file.name)
        self.manifest = self.processes.decide(dict)
        return self.load(file, load)

    def _give_up(
        self, key: str, file: Path, before: dict[str, Any] | None, *, refused: bool
    ) -> None:
        """Let the record of a stage that failed be what it was, where its file still is."""
        if before is not None and before["done"] and os.path.lexists(file):
            if changed_since(file, before) is not None:
                return
            self.manifest["stages"][key] = before
        elif before is None and refused:
            del self.manifest["stages"][key]
        else:
            return
        self.save()


def _begun(path: Path) -> bool:
    """Whether a folder holds nothing yet, or only what a kill before its first file left."""
    return all(map(is_leftover, path.iterdir()))


def _difference(record: dict[str, Any], options: dict[str, Any]) -> str:
    before = record.get("options", {})
    changed = [
        f"{k}: {before.get(k)!r} there, {options.get(k)!r} now"
        for k in dict.fromkeys([*options, *before])
        if before.get(k) != options.get(k)
    ]
    return "; ".join(changed) or "the model differs"
