"""The work folder of a healing, for resuming; claimed by its options, never a folder of yours.

identity.json   everything that the work depends on
before.json     figures of the cut model
patched/ .json  the patched checkpoint, its record
recipe.json     the settings for a budget: steps, their size, the learning rate
trial/          temporary files of the timing
memory.json     micro-batch size and recomputation of the training
trainer/        saved states of the training; incomplete ones are ignored
done/           the result, before it is renamed
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from isingcut.errors import IsingcutError, ModelError, StageFileError
from isingcut.files.healings import HealingCurve, HealingWork
from isingcut.files.ownership import MARKER, check_output, foreign_in, refuse_source
from isingcut.files.results import fingerprint, read_document, write_document
from isingcut.files.schema import Document
from isingcut.files.writing import clear_leftovers, clear_os_errors, is_leftover
from isingcut.healing.job import Job, trainer_settings
from isingcut.memory import convert_memory_errors
from isingcut.models.sources import model_identity
from isingcut.options.config import HealConfig

if TYPE_CHECKING:
    from isingcut.data.healing_text import HealingText

D = TypeVar("D", bound=Document)

_IDENTITY = "identity.json"
_FILES = ("before.json", "patched.json", "recipe.json", "memory.json")
_FOLDERS = ("patched", "trial", "trainer", "done")
CURVE = "healing-curve.json"
"""The loss curve in a state of a training."""


def work_of(out: Path) -> Path:
    """Return the work folder of a healing into ``out``."""
    return out.parent / f".{out.name}.healing"


def described_options(config: HealConfig) -> dict[str, Any]:
    """Return the options of a healing that affect its result."""
    return {
        k: v
        for k, v in dataclasses.asdict(config).items()
        if k not in ("student", "teacher", "out", "overwrite", "trust_remote_code")
    }


def identity_of(job: Job, text: HealingText) -> str:
    """Return the identity of a healing: everything that its work depends on."""
    config, teacher = job.config, job.teacher
    options = {k: v for k, v in described_options(config).items() if k != "device"}
    settings = trainer_settings(config)
    settings.pop("save_steps", None)
    both = (text.train, text.report)
    return fingerprint(
        {
            "options": {**options, "trainer": settings},
            "teacher": model_identity(teacher.folder)["sha256"],
            "student": model_identity(job.start)["sha256"],
            "removed": list(job.removed),
            "tokens": fingerprint([tokens.input_ids.tolist() for tokens in both]),
            "counted": [None if t.counted is None else t.counted.tolist() for t in both],
            "dtype": str(teacher.dtype),
        }
    )


def complete_states(trainer: Path) -> list[Path]:
    """List the complete states of a training, the latest last."""
    found = {}
    for path in trainer.glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if step.isdigit() and (path / MARKER).is_file() and foreign_in(path) is None:
            with contextlib.suppress(StageFileError):
                read_document(path / CURVE, HealingCurve)
                found[int(step)] = path
    return [found[step] for step in sorted(found)]


def check_places(config: HealConfig, out: Path, sources: Sequence[str | os.PathLike[str]]) -> None:
    """Check that an output and its work folder may be written.

    Raises:
        InputError, OutputExistsError: as `outputs.check_output`.
        StageFileError: the work folder exists and is not one.
    """
    work = work_of(out)
    check_output(out, overwrite=config.overwrite, sources=sources)
    refuse_source(work, sources)
    if os.path.lexists(work):
        _owner(work)


@contextlib.contextmanager
def claim_work(work: Path, identity: str) -> Iterator[None]:
    """Claim the work folder of a healing, to resume the same healing or start a new one.

    If the healing fails, the folder is deleted if it has nothing to resume from, or if the model
    caused the failure, which would repeat. Otherwise the error says that it is kept.

    Args:
        identity: everything that the work depends on.

    Raises:
        StageFileError: it has finished work of another healing, or files not of isingcut.
        InputError: the disk is full.
    """
    if os.path.lexists(work) and _owner(work) not in (None, identity):
        if _is_worth_keeping(work):
            raise StageFileError(
                f"{work} has an unfinished healing with other options; run that command again to "
                "finish it, or delete the folder"
            )
        release(work)
    with clear_os_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    write_document(work / _IDENTITY, HealingWork(work=identity))
    clear_leftovers(work)
    try:
        with clear_os_errors(work), convert_memory_errors():
            yield
    except BaseException as e:
        if isinstance(e, ModelError) or not _is_worth_keeping(work):
            release(work)
        elif isinstance(e, IsingcutError):
            said = f"finished work is kept in {work}; run the same command again to resume"
            e.args = (f"{e}; {said}",)
        raise
    release(work)


def keep_result(file: Path, model: type[D], make: Callable[[], D]) -> D:
    """Read the result of an interrupted healing from a file, or make it now and write it."""
    if not file.exists():
        write_document(file, make())
    return read_document(file, model)


def release(work: Path) -> None:
    """Delete the files of a healing; other files stay, and the folder with them."""
    for name in _FOLDERS:
        shutil.rmtree(work / name, ignore_errors=True)
    for name in (*_FILES, _IDENTITY):
        (work / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        work.rmdir()


def _owner(work: Path) -> str | None:
    """Return the identity of the work; None for an empty folder."""
    if not work.is_symlink() and work.is_dir():
        if all(map(is_leftover, work.iterdir())):
            return None
        with contextlib.suppress(StageFileError):
            return read_document(work / _IDENTITY, HealingWork).work
    raise StageFileError(
        f"{work}, the folder for unfinished work, exists and is not from this version of "
        "isingcut; nothing was changed: move it away, or choose another --out"
    )


def _is_worth_keeping(work: Path) -> bool:
    return (work / "patched.json").exists() or bool(complete_states(work / "trainer"))
