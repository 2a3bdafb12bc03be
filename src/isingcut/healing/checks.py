"""What a healing refuses by its options alone: places, packages, optimiser and schedule."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from isingcut.data.mixture import places_in
from isingcut.errors import InputError
from isingcut.files.inputs import user_path
from isingcut.files.writing import check_output, refuse_source
from isingcut.healing.trainer_file import check_optimiser
from isingcut.healing.work_folder import refuse_foreign, work_of
from isingcut.models.checkpoint.read import PLAIN, read_checkpoint
from isingcut.models.device import pick_device
from isingcut.models.processes import launched
from isingcut.options.config import HealConfig


def sources_of(config: HealConfig) -> list[Path]:
    """What a healing reads, of what its options name on disk."""
    names = (config.student, config.teacher, *places_in(config.text), config.trainer)
    return [user_path(name) for name in names if name]


def check_places(config: HealConfig, out: Path, sources: Sequence[str | os.PathLike[str]]) -> None:
    """Refuse an output, or its work folder, that must not be written.

    Raises:
        InputError, OutputExistsError: as `outputs.check_output`.
        StageFileError: something else is where the unfinished work would be kept.
    """
    check_output(out, overwrite=config.overwrite, sources=sources)
    refuse_source(work_of(out), sources)
    refuse_foreign(work_of(out))


def check_training(config: HealConfig, student: Path | None = None) -> None:
    """Refuse training options that cannot work, and weights that cannot be trained.

    Args:
        student: None where it does not exist yet.

    Raises:
        InputError: with the option and what it expects.
    """
    if config.method == "none":
        return
    if (index := pick_device(config.device).index) and not launched():
        raise InputError(
            "the Trainer takes the first GPU that it sees; type CUDA_VISIBLE_DEVICES="
            f"{index} before the command and --device cuda"
        )
    check_optimiser(config)
    if student is not None:
        stored_dtype(student)


def check_last(config: HealConfig, blocks: int) -> None:
    """Refuse to train more blocks than a cut model has.

    Raises:
        InputError: with how many there are.
    """
    if config.last is not None and config.last > blocks:
        raise InputError(f"--method {config.method}: the cut model has {blocks} blocks; give fewer")


def stored_dtype(folder: Path) -> str:
    """The dtype that holds most of a checkpoint's weights, by its name in a file.

    Raises:
        InputError: quantised weights, which cannot be trained.
    """
    sizes: dict[str, int] = {}
    for tensor in read_checkpoint(folder).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    name = max(sizes, key=lambda k: sizes[k])
    if name not in PLAIN:
        raise InputError(
            f"{folder} holds {name} weights, which cannot be trained; cut and heal the unquantised "
            "model (the teacher may be quantised)"
        )
    return name
