"""The folder of a healing in progress: claimed by its options, gone on from, never a user's own.

identity.json   what the work depends on, and what the training in it does
before.json     figures of the cut model
patched/ .json  the patched checkpoint, its record
targets/        the teacher's kept answers
recipe.json     what a budget bought: steps, their size, the learning rate
trial/          what its speed is measured in
way.json        how the training is computed
trainer/        states that a training goes on from, each complete or left out
trained/ .json  the trained weights, their record
done/           the result, before it takes its name
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.errors import InputError, IsingcutError, StageFileError
from isingcut.files.inputs import user_path
from isingcut.files.outputs import MARKER, foreign_in
from isingcut.files.writing import (
    clear_leftovers,
    clear_os_errors,
    disk_is_full,
    fingerprint,
    is_leftover,
    read_json,
    without_header,
    write_json,
)
from isingcut.healing.trainer_file import read_trainer_file
from isingcut.memory import convert_memory_errors
from isingcut.models.sources import model_identity
from isingcut.options.healing import HealConfig

if TYPE_CHECKING:
    from isingcut.data.healing_text import HealingText
    from isingcut.models.load import LoadedModel

_IDENTITY, _KIND = "identity.json", "healing-work"
_TRAINING = ("recipe.json", "trial", "way.json", "trainer", "trained", "trained.json", "done")
_HEALING = ("before.json", "patched", "patched.json", "targets", *_TRAINING)
_FINISHED = ("patched.json", "targets/done.json", "trained.json")
CURVE = "healing-curve.json"
"""In a state of a training: its loss so far, and which training it is of."""
_CANDIDATE = re.compile(r"\d+(-\d+)*")
_OF_TRAINING = (
    "method",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "epochs",
    "top_steps",
    "steps",
    "batch",
    "micro_batch",
    "temperature",
    "hidden_weight",
    "lora_rank",
    "lora_alpha",
    "gradient_checkpointing",
    "trainer",
)
"""Options that change neither the patch nor the teacher's kept answers."""


def work_of(out: Path) -> Path:
    """The folder for what an interrupted healing into ``out`` goes on from."""
    return out.parent / f".{out.name}.healing"


def told(config: HealConfig) -> dict[str, Any]:
    """The options of a healing that say what it does, and not where."""
    return {
        k: v
        for k, v in dataclasses.asdict(config).items()
        if k not in ("student", "teacher", "out", "overwrite", "trust_remote_code")
    }


def identities(
    config: HealConfig,
    teacher: LoadedModel,
    removed: Sequence[int],
    student: Path,
    text: HealingText,
) -> tuple[str, str]:
    """What the patch and the kept answers depend on, and what the training depends on."""
    options = {k: v for k, v in told(config).items() if k not in ("device", "save_steps")}
    training = {k: options.pop(k) for k in _OF_TRAINING}
    if config.trainer:
        training["trainer"] = read_trainer_file(user_path(config.trainer))
    depends = {
        "options": options,
        "teacher": model_identity(teacher.folder)["sha256"],
        "student": model_identity(student)["sha256"],
        "removed": list(removed),
        "tokens": fingerprint([text.train.input_ids.tolist(), text.report.input_ids.tolist()]),
        **_counted(text),
        "dtype": str(teacher.dtype),
    }
    return fingerprint(depends), fingerprint({**depends, "training": training})


def _counted(text: HealingText) -> dict[str, str]:
    """Which tokens count, where not all do."""
    found = [tokens.counted for tokens in (text.train, text.report)]
    if all(counted is None for counted in found):
        return {}
    return {"counted": fingerprint([None if c is None else c.tolist() for c in found])}


def complete_states(trainer: Path, training: str) -> list[Path]:
    """The states of one training that were written to their end, the latest last."""
    found = {}
    for path in trainer.glob("checkpoint-*"):
        step = path.name.rpartition("-")[2]
        if step.isdigit() and (path / MARKER).is_file() and foreign_in(path) is None:
            with contextlib.suppress(StageFileError):
                if read_json(path / CURVE, "healing-curve").get("training") == training:
                    found[int(step)] = path
    return [found[step] for step in sorted(found)]


@contextlib.contextmanager
def held(work: Path, identity: str, training: str = "") -> Iterator[None]:
    """Hold the work folder of a healing: gone on from where it fits, left only if worth it.

    When the healing fails, the folder goes where nothing in it is worth going on from; else the
    error says that it stays.

    Args:
        identity: what the patch and the kept answers depend on.
        training: what the training depends on.

    Raises:
        StageFileError: it holds another healing's finished work, or what isingcut did not write.
        InputError: the disk is full.
    """
    _claim(work, identity, training)
    clear_leftovers(work)
    try:
        with convert_memory_errors():
            yield
    except BaseException as e:
        stays = _worth_keeping(work)
        if not stays:
            release(work)
        said = f"; what was finished is kept in {work}, and the next call goes on from it"
        if isinstance(e, IsingcutError) and stays:
            e.args = (f"{e}{said}",)
        elif isinstance(e, Exception) and disk_is_full(e):
            raise InputError(
                f"no space left on the disk while healing in {work}; free some space, then type "
                f"the same command again{said if stays else ''}"
            ) from e
        raise
    release(work)


def kept(
    file: Path, make: Callable[[], dict[str, Any]], training: str | None = None
) -> dict[str, Any]:
    """What an interrupted healing has written to a file, or else is made now and written.

    Args:
        training: the identity of the training whose result it is; another's is not taken.
    """
    if not is_kept(file, training):
        write_json(file, f"healing-{file.stem}", {**make(), "training": training})
    found = without_header(read_json(file, f"healing-{file.stem}"))
    found.pop("training", None)
    return found


def is_kept(file: Path, training: str | None = None) -> bool:
    """Whether a file has what `kept` gives."""
    return file.exists() and read_json(file, f"healing-{file.stem}").get("training") == training


def refuse_foreign(work: Path) -> None:
    """Refuse a folder in the place of the work folder that isingcut did not make.

    Raises:
        StageFileError: it is there, not empty, and no healing's.
    """
    if os.path.lexists(work):
        _held_by(work)


def forget_all(work: Path) -> None:
    """Drop what a healing has made from weights that were changed meanwhile."""
    _drop(work, _HEALING)


def forget_training(work: Path) -> None:
    """Drop a training that came to nothing, so that one with other options can take its place."""
    before = _held_by(work)
    _drop(work, _TRAINING)
    if before is not None:
        _note(work, before[0], "")


def release(work: Path) -> None:
    """Delete what a healing made; a file that it did not make stays, and the folder with it."""
    _drop(work, _ours(work))
    with contextlib.suppress(OSError):
        work.rmdir()


def _claim(work: Path, identity: str, training: str) -> None:
    if os.path.lexists(work) and (before := _held_by(work)) is not None:
        if before == (identity, training):
            return
        same = before[0] == identity
        if before[1] and _trained(work) if same else _worth_keeping(work):
            raise StageFileError(
                f"{work} holds an unfinished healing with other options; type that command again "
                "to finish it, or delete the folder"
            )
        _drop(work, _TRAINING if same else _ours(work))
    with clear_os_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    _note(work, identity, training)


def _held_by(work: Path) -> tuple[str, str] | None:
    """Whose work it is; None for an empty folder, or one of a kill before its first file."""
    if not work.is_symlink() and work.is_dir():
        if all(map(is_leftover, work.iterdir())):
            return None
        with contextlib.suppress(StageFileError, KeyError):
            found = read_json(work / _IDENTITY, _KIND)
            return str(found["work"]), str(found["training"])
    raise StageFileError(
        f"{work}, where healing keeps its unfinished work, is there and no healing of this version "
        "of isingcut made it; nothing was touched: move it away, or choose another --out"
    )


def _note(work: Path, identity: str, training: str) -> None:
    write_json(work / _IDENTITY, _KIND, {"work": identity, "training": training})


def _trained(work: Path) -> bool:
    training = str(read_json(work / _IDENTITY, _KIND)["training"])
    return (work / "trained.json").exists() or bool(complete_states(work / "trainer", training))


def _worth_keeping(work: Path) -> bool:
    done = any((work / name).exists() for name in _FINISHED)
    return done or _trained(work) or any(work.glob("*/healed"))


def _ours(work: Path) -> list[str]:
    """The names in a work folder that healing gives, the one that says so last."""
    names = [p.name for p in work.iterdir()]
    return [*(n for n in names if n in _HEALING or _CANDIDATE.fullmatch(n)), _IDENTITY]


def _drop(work: Path, names: Sequence[str]) -> None:
    for name in names:
        path = work / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
