"""What a healing refuses before any weight is read: places, teacher, record, words and sizes."""

from __future__ import annotations

import copy
import os
import string
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isingcut.errors import InputError
from isingcut.healing.work_folder import refuse_foreign, work_of
from isingcut.inputs import user_path
from isingcut.options.healing import HealConfig
from isingcut.outputs import check_output, refuse_source

if TYPE_CHECKING:
    from isingcut.healing.removed import Removal

_NEVER_FALL = ("reduce_lr_on_plateau", "greedy")
_PROBE = string.printable + "The old mill stood by the river. naïve 東京 😀"


def sources_of(config: HealConfig) -> list[Path]:
    """What a healing reads, of what its options name on disk."""
    names = (config.student, config.teacher, config.text, config.trainer)
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
        MissingExtraError: a package that training needs.
    """
    if config.method == "none":
        return
    from isingcut.healing.healers.distill import need_packages, stored_dtype

    need_packages(config)
    settings: dict[str, Any] = {}
    if config.trainer:
        from isingcut.healing.training.trainer_file import read_trainer_file

        settings = read_trainer_file(user_path(config.trainer))
    _check_optimiser(config, settings.get("optim"))
    _check_schedule(config, settings.get("lr_scheduler_kwargs") or {})
    if student is not None:
        stored_dtype(student)


def _check_optimiser(config: HealConfig, name: str | None) -> None:
    from transformers.training_args import OptimizerNames

    names = [o.value for o in OptimizerNames]
    if name is not None and name not in names:
        raise InputError(
            f"{config.trainer}: optim must be one of {', '.join(names)}; got {name[:60]!r}"
        )


def _check_schedule(config: HealConfig, further: dict[str, Any]) -> None:
    import torch
    from transformers import get_scheduler

    if config.schedule in _NEVER_FALL:
        raise InputError(
            f"--schedule {config.schedule} falls when an evaluation says so, and healing makes "
            "none; choose another, for example cosine"
        )
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.rate)
    try:
        get_scheduler(config.schedule, optimiser, 1, 10, scheduler_specific_kwargs=further)
    except (TypeError, ValueError, AttributeError, KeyError) as e:
        raise InputError(
            f"--schedule {config.schedule} does not take its settings ({' '.join(str(e).split())});"
            " give them in the --trainer file, as lr_scheduler_kwargs"
        ) from e


def check_pair(config: HealConfig, student: Path, removal: Removal | None, teacher: Path) -> None:
    """Refuse a student and a teacher that do not belong together, from their small files.

    Args:
        student, teacher: folders.
        removal: the student's own record, None without one.

    Raises:
        InputError: another model than the record's, another vocabulary or tokenizer, a record
            that is not this checkpoint's, or options that do not fit the model.
    """
    from isingcut.healing.removed import check_cut, check_original
    from isingcut.models.fit import check_fit

    for folder in (student, teacher):
        check_fit(folder)
    if removal is not None:
        if not config.other_teacher:
            check_original(student, removal, config.teacher, teacher)
        check_cut(student, removal, config.teacher, teacher)
        if config.hidden_weight and removal.removed == tuple(range(len(removal.removed))):
            raise InputError(
                "--hidden-weight matches hidden states behind each cut at the block before it, and "
                f"{student} lacks its first blocks only; leave it out"
            )
    ours, theirs = _text_config(student), _text_config(teacher)
    for name, words in {"vocab_size": "vocabulary", "hidden_size": "width"}.items():
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"{student} has a {words} of {ours.get(name)}, but the teacher {config.teacher} "
                f"one of {theirs.get(name)}; give the model it was cut from"
            )
    size = theirs.get("vocab_size")
    if isinstance(size, int) and config.top_k > size:
        raise InputError(
            f"--top-k {config.top_k} is more than the {size} tokens of the vocabulary; "
            f"give at most {size}"
        )
    width = theirs.get("hidden_size")
    if config.method == "lora" and isinstance(width, int) and config.lora_rank > width:
        raise InputError(
            f"--lora-rank {config.lora_rank} is more than the model's width of {width}, which is "
            "the rank of all its matrices; give less, or --method full"
        )
    _check_tokenizers(config, student, teacher)


def _text_config(folder: Path) -> dict[str, Any]:
    from isingcut.models.architectures.surgery import materialise
    from isingcut.models.checkpoint.read import read_config

    return materialise(copy.deepcopy(read_config(folder)))


def _check_tokenizers(config: HealConfig, student: Path, teacher: Path) -> None:
    ours, theirs = (
        _ids(folder, trust_remote_code=config.trust_remote_code) for folder in (student, teacher)
    )
    if ours != theirs:
        raise InputError(
            f"{student} and the teacher {config.teacher} have tokenizers that read the same text "
            "differently; copy the original's tokenizer files into the cut model's folder"
        )


def _ids(folder: Path, *, trust_remote_code: bool) -> list[int]:
    from transformers import AutoTokenizer

    from isingcut.data.encoder import Encoder
    from isingcut.models.loading import loading
    from isingcut.models.sources import check_tokenizer

    check_tokenizer(folder)
    with loading(f"the tokenizer in {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return Encoder(tokenizer)(_PROBE)
