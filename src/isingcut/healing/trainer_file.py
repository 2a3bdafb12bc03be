"""The file of `--trainer`: transformers' TrainingArguments, but for where it writes or sends."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

from isingcut.errors import InputError
from isingcut.files.inputs import user_path
from isingcut.models.loading import one_line
from isingcut.options.config import HealConfig
from isingcut.options.declaration import load_yaml

__all__ = ["check_optimiser", "is_sharded", "read_trainer_file", "trainer_settings"]

_FIXED = re.compile(
    "output_dir|hub_.*|push_to_hub|report_to|run_name|project|trackio_.*|log.*|disable_tqdm|"
    "eval_.*|.*_eval|.*_eval_.*|prediction_loss_only|include_.*|batch_eval_metrics|"
    "metric_for.*|greater_is_better|load_best.*|save_(?!steps).*|enable_jit_checkpoint|"
    "resume_from.*|restore_.*|ignore_data_skip|seed|data_seed|use_cpu|local_rank|do_.*|debug|"
    "auto_find_batch_size|remove_unused_columns|label_.*|train_sampling.*|length_column_name|"
    "dataloader_drop_last|parallelism_config|use_cache"
)
"""What a healing decides: where it writes and sends, what it judges, which samples it takes."""
_NEVER_FALL = ("reduce_lr_on_plateau", "greedy")


def read_trainer_file(path: Path) -> dict[str, Any]:
    """`TrainingArguments` from a YAML file, by their names there.

    Raises:
        InputError: not readable, a name that may not be set there, or a value of a wrong type.
    """
    # Not at the top: it takes seconds, and most healings have no such file.
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from transformers import TrainingArguments

    values, types = load_yaml(path), get_type_hints(TrainingArguments)
    names = [f.name for f in fields(TrainingArguments) if not _FIXED.fullmatch(f.name)]
    strict = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    for name, value in values.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"{path}: --trainer cannot set {str(name)[:60]!r}; {hint}options of `isingcut "
                f"heal` are given as such, and what writes or sends elsewhere is fixed; it may "
                f"set: {', '.join(names)}"
            )
        try:
            TypeAdapter(types[name], config=strict).validate_python(value)
        except ValidationError as e:
            why = e.errors(include_url=False)[0]["msg"].lower()
            raise InputError(f"{path}: {name}: {why}, got {str(value)[:60]!r}") from e
    for name in ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if values.get(name, 1) < 1:
            raise InputError(f"{path}: {name} must be at least 1, got {values[name]}")
    for name in ("learning_rate", "num_train_epochs"):
        if values.get(name, 1) <= 0:
            raise InputError(f"{path}: {name} must be above 0, got {values[name]}")
    return values


def trainer_settings(config: HealConfig) -> dict[str, Any]:
    """What the file of `--trainer` sets; nothing where there is none.

    Raises:
        InputError: as `read_trainer_file`.
    """
    return read_trainer_file(user_path(config.trainer)) if config.trainer else {}


def check_optimiser(config: HealConfig) -> None:
    """Refuse an optimiser or a schedule that transformers cannot make with the file's settings.

    Raises:
        InputError: with its own words.
    """
    if not config.trainer:
        return
    import torch
    from transformers import Trainer, TrainingArguments, get_scheduler
    from transformers.training_args import OptimizerNames

    settings = trainer_settings(config)
    args: Any = SimpleNamespace(
        **{f.name: None if f.default is MISSING else f.default for f in fields(TrainingArguments)}
        | settings
    )
    if args.lr_scheduler_type in _NEVER_FALL:
        raise InputError(
            f"{config.trainer}: lr_scheduler_type {args.lr_scheduler_type} falls when an "
            "evaluation says so, and healing makes none; choose another, for example cosine"
        )
    try:
        args.optim = OptimizerNames(args.optim)
        optimiser: Any = torch.optim.SGD([torch.zeros(1)])
        if args.optim_target_modules is None:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
            optimiser = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        further = args.lr_scheduler_kwargs or {}
        get_scheduler(args.lr_scheduler_type, optimiser, 1, 10, scheduler_specific_kwargs=further)
    except (TypeError, ValueError, AttributeError, KeyError, ImportError) as e:
        raise InputError(
            f"{config.trainer}: transformers refuses the optimiser (optim, adam_*) or the schedule "
            f"(lr_scheduler_type, lr_scheduler_kwargs): {one_line(e)}"
        ) from e


def is_sharded(settings: Mapping[str, Any]) -> bool:
    """Whether FSDP or DeepSpeed shards the training, and so places its parts on the devices."""
    launched = (os.environ.get(f"ACCELERATE_USE_{name}", "") for name in ("FSDP", "DEEPSPEED"))
    return bool(settings.get("fsdp") or settings.get("deepspeed")) or "true" in map(
        str.lower, launched
    )
