"""Store the steps of a healing in a work folder, to resume it. User folders are never used.

All of them depend on the same inputs, whose fingerprint is in `identity.json`.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from isingcut.errors import IsingcutError, ModelError, StageFileError
from isingcut.files.healings import HealingCurve, HealingWork
from isingcut.files.ownership import MARKER, check_output, foreign_in, refuse_source
from isingcut.files.results import read_document, write_document
from isingcut.files.schema import Document
from isingcut.files.stages import Declaration, is_made
from isingcut.files.writing import (
    clear_leftovers,
    clear_os_errors,
    delete,
    is_leftover,
)
from isingcut.memory import convert_memory_errors
from isingcut.options.heal import HealConfig

D = TypeVar("D", bound=Document)

_IDENTITY = "identity.json"
BEFORE = Declaration("heal", "before.json")
"""The scores of the cut model."""
PATCHED = Declaration("heal", "patched")
"""The patched checkpoint."""
PATCH = Declaration("heal", "patched.json")
"""The record of the patch, and the scores of the patched checkpoint."""
RECIPE = Declaration("heal", "recipe.json")
"""The training settings for a budget: steps, batch size, sample length, learning rate."""
TRIAL = Declaration("heal", "trial")
"""Temporary files of the timing run."""
MEMORY = Declaration("heal", "memory.json")
"""The micro-batch size, and whether activations are recomputed."""
TRAINER = Declaration("heal", "trainer")
"""The saved training states; incomplete ones are ignored."""
DONE = Declaration("heal", "done")
"""The healed checkpoint, before it is renamed."""
STEPS = (BEFORE, PATCHED, PATCH, RECIPE, TRIAL, MEMORY, TRAINER, DONE)
"""The steps, in the order of a healing."""
CURVE = "healing-curve.json"
"""File name of the loss curve in a saved training state."""


def work_of(out: Path) -> Path:
    """Return the work folder of a healing into ``out``."""
    return out.parent / f".{out.name}.healing"


def describe_options(config: HealConfig) -> dict[str, Any]:
    """Return the options of a healing that affect its result."""
    options = dataclasses.asdict(config) | {"effort": config.training}
    for name in (
        *("student", "teacher", "out", "overwrite"),
        *("trust_remote_code", "device", "train"),
    ):
        del options[name]
    return options


def complete_states(work: Path) -> list[Path]:
    """List the complete saved states of a training in a work folder, oldest first."""
    states = {}
    for path in (work / TRAINER.file).glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if step.isdigit() and (path / MARKER).is_file() and foreign_in(path) is None:
            with contextlib.suppress(StageFileError):
                read_document(path / CURVE, HealingCurve)
                states[int(step)] = path
    return [states[step] for step in sorted(states)]


def check_places(
    config: HealConfig, out: Path, sources: Sequence[str | os.PathLike[str]]
) -> None:
    """Check that an output and its work folder may be written.

    Raises:
        InputError, OutputExistsError: as `ownership.check_output`.
        StageFileError: the path of the work folder exists and is not a work folder.
    """
    work = work_of(out)
    check_output(out, overwrite=config.overwrite, sources=sources)
    refuse_source(work, sources)
    _owner(work)


@contextlib.contextmanager
def claim_work(work: Path, identity: str) -> Iterator[None]:
    """Claim the work folder of a healing, to resume the same healing or start a new one.

    After success the folder is deleted. After an error it is kept, and an `IsingcutError` names it,
    unless it has nothing to resume from or the error is a `ModelError`, which would recur.

    Args:
        identity: fingerprint of everything that the work depends on.

    Raises:
        StageFileError: the folder has work of another healing, or is not a work folder.
        InputError: the disk is full.
    """
    owner = _owner(work)
    if owner and not is_made(work, owner, identity):
        if _is_worth_keeping(work):
            raise StageFileError(
                f"{work} has an unfinished healing with other options or models; run that command "
                "again to finish it, or delete the folder"
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
            hint = (
                f"finished work is kept in {work}; run the same command again to resume"
            )
            e.args = (f"{e}; {hint}",)
        raise
    release(work)


def keep_result(file: Path, model: type[D], make: Callable[[], D]) -> D:
    """Return the result that an interrupted healing stored in ``file``, or make and store it."""
    if not file.exists():
        write_document(file, make())
    return read_document(file, model)


def release(work: Path) -> None:
    """Delete the files of a healing, and the folder unless it has other files."""
    for step in STEPS:
        delete(work / step.file)
    (work / _IDENTITY).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        work.rmdir()


def _owner(work: Path) -> str | None:
    """Return the identity in a work folder; None without one, or with temporary files only."""
    if not os.path.lexists(work):
        return None
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
    return (work / PATCH.file).exists() or bool(complete_states(work))
