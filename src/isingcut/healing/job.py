"""Define one healing: the cut model, the judge of its training, and the training settings.

The judge stops a training that makes the model worse. It uses checks: the KL to the original on
each unseen sample, computed as the training loss. Checks are made when states are saved, so that a
resumed healing has the earlier ones.

The section `trainer` may set transformers' TrainingArguments, except those that healing sets. A
budget of tokens or time determines the steps, batch size, sample length and learning rate.
"""

import difflib
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np

from isingcut.console.progress import Progress, silent
from isingcut.data.tokens import TokenSet, pieces
from isingcut.errors import InputError, one_line
from isingcut.files.healings import HealingCheck, HealingRecipe, HealingStop
from isingcut.formats.architectures.blocks import text_config
from isingcut.formats.architectures.removed import Removed
from isingcut.formats.safetensors_files import PLAIN, read_checkpoint
from isingcut.measure.losses import difference
from isingcut.models.device import pick_device
from isingcut.models.load import LoadedModel
from isingcut.options.heal import LENGTH, HealConfig
from isingcut.processes import ALONE, Processes, is_launched

# Tokens of each sample that a check uses.
_LENGTH = 256
_ERRORS = 2.0
"""Number of standard errors of a paired difference that counts as more than noise."""


def keep_beginnings(tokens: TokenSet) -> TokenSet:
    """Return the first tokens of each sample, for cheap checks."""
    rows = []
    for row in tokens.rows:
        # The context before the first assistant message may be longer than that.
        first = next((t for t in range(1, len(row)) if row[t] >= 0), 0)
        rows.append(row[: max(_LENGTH, first + _LENGTH // 4)])
    return TokenSet.from_rows(rows, parts=tokens.parts)


class Domains:
    """Judge that stops a training when the KL on one source of its text gets worse.

    The KL must be more than two standard errors above both the KL before the training and that of
    the previous check. The weights of the previous check are kept, or the initial ones if the KL of
    the previous check was that much higher too. The first check never stops the training.
    """

    def __init__(self, report: TokenSet) -> None:
        self.tokens = keep_beginnings(report)
        self._parts = self.tokens.rows_by_part or {"": list(range(report.samples))}

    def verdict(self, checks: Sequence[HealingCheck]) -> HealingStop | None:
        if len(checks) < 3:
            return None
        begin = checks[0]
        before = checks[-2]
        now = checks[-1]
        counts = self.tokens.counts
        for name, rows in self._parts.items():
            start, last, here = (
                np.asarray(c.kl_sums)[rows] for c in (begin, before, now)
            )
            worse = [difference(past, here, counts[rows]) for past in (start, last)]
            # The error is NaN for a single sample, which is never worse.
            if all(mean > _ERRORS * error for mean, error in worse):
                kl = [
                    float(sums.sum() / counts[rows].sum())
                    for sums in (start, last, here)
                ]
                where = f"on {name} the model" if name else "the model"
                mean, error = difference(start, last, counts[rows])
                kept = 0 if mean > _ERRORS * error else before.step
                what = f"the weights of step {kept} are" if kept else "no step is"
                return HealingStop(
                    why=f"healing was stopped at step {now.step}, and {what} kept: {where} got "
                    f"worse, KL {kl[0]:.4f} before, {kl[1]:.4f} and then {kl[2]:.4f}",
                    kept=kept,
                )
        return None


@dataclass(frozen=True, eq=False)
class Job:
    """One cut model to heal.

    Attributes:
        teacher: the original model; without weights if it is streamed.
        removed: the state of the cut model.
        start: the cut model's checkpoint.
        tokens: training text; never the text for reported results.
        work: work folder, for resuming.
        config: all options.
        progress: progress display.
        processes: the processes that train together.
        judge: judge of the checks, which may stop the training; None never stops it.
        recipe: settings of the training; None takes them from the options.
        spent: seconds of a time budget needed for the text, evaluating and patching.
    """

    teacher: LoadedModel
    removed: Removed
    start: Path
    tokens: TokenSet
    work: Path
    config: HealConfig
    progress: Progress = silent
    processes: Processes = ALONE
    judge: Domains | None = None
    recipe: HealingRecipe | None = None
    spent: float = 0.0

    @property
    def leads(self) -> bool:
        """Whether this process writes and shows progress."""
        return self.processes.rank == 0


# The settings of a training ---------------------------------------------------------------

_FIXED = re.compile(
    "output_dir|hub_.*|push_to_hub|report_to|run_name|project|trackio_.*|log.*|disable_tqdm|"
    "eval_.*|.*_eval|.*_eval_.*|prediction_loss_only|include_.*|batch_eval_metrics|"
    "metric_for.*|greater_is_better|load_best.*|save_(?!steps).*|enable_jit_checkpoint|"
    "resume_from.*|restore_.*|ignore_data_skip|seed|data_seed|use_cpu|local_rank|do_.*|debug|"
    "auto_find_batch_size|remove_unused_columns|label_.*|train_sampling.*|length_column_name|"
    "dataloader_.*|parallelism_config|use_cache"
)
"""Arguments that healing sets itself: outputs, reporting, evaluation and sampling."""
_POSITIVE = {
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "num_train_epochs"),
}
_NEVER_FALL = ("reduce_lr_on_plateau", "greedy")


def trainer_settings(config: HealConfig) -> dict[str, Any]:
    """Return a checked copy of the `TrainingArguments` in the section `trainer`.

    Raises:
        InputError: a name that may not be set, or a value of a wrong type.
    """
    if not config.trainer:
        return {}
    # Imported here because it takes seconds, and most healings set none.
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from transformers import TrainingArguments

    types = get_type_hints(TrainingArguments)
    values = dict(config.trainer.values)
    names = [f.name for f in fields(TrainingArguments) if not _FIXED.fullmatch(f.name)]
    strict = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    for name, value in values.items():
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"--trainer cannot set {str(name)[:60]!r}; {hint}options of `isingcut heal` "
                f"stand outside of it; it may set: {', '.join(names)}"
            )
        # transformers also accepts a boolean for fsdp, and prefers it.
        kind = types[name] | bool if name == "fsdp" else types[name]
        try:
            TypeAdapter(kind, config=strict).validate_python(value)
        except ValidationError as e:
            why = e.errors(include_url=False)[0]["msg"].lower()
            raise InputError(
                f"--trainer: {name}: {why}, got {str(value)[:60]!r}"
            ) from e
    for name in _POSITIVE & values.keys():
        if values[name] <= 0:
            raise InputError(f"--trainer: {name} must be above 0, got {values[name]}")
    return values


def check_training(config: HealConfig, student: Path | None = None) -> None:
    """Check the training options, and that the weights can be trained.

    Args:
        student: folder of the checkpoint; None if it does not exist yet.

    Raises:
        InputError: a wrong option; the message has its name and the expected values.
    """
    if config.method == "none":
        return
    if (index := pick_device(config.device).index) and not is_launched():
        raise InputError(
            "the Trainer uses the first visible GPU; put CUDA_VISIBLE_DEVICES="
            f"{index} before the command and give --device cuda"
        )
    if config.trainer:
        _check_optimiser(config)
        if trainer_settings(config).get("fsdp") and not is_launched():
            raise InputError(
                "--trainer: fsdp needs several processes; start them with torchrun"
            )
    if student is not None:
        stored_dtype(student)


def _check_optimiser(config: HealConfig) -> None:
    """Check that transformers can create the optimiser and the schedule."""
    import torch
    from transformers import Trainer, TrainingArguments, get_scheduler
    from transformers.training_args import OptimizerNames

    defaults = {f.name: f.default for f in fields(TrainingArguments)}
    args: Any = SimpleNamespace(**defaults | trainer_settings(config))
    if args.lr_scheduler_type in _NEVER_FALL:
        raise InputError(
            f"--trainer: lr_scheduler_type {args.lr_scheduler_type} needs evaluations, but "
            "healing makes none; choose another, for example cosine"
        )
    try:
        args.optim = OptimizerNames(args.optim)
        optimiser: Any = torch.optim.SGD([torch.zeros(1)])
        if args.optim_target_modules is None:
            kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
            optimiser = kind([torch.nn.Parameter(torch.zeros(1))], **options)
        further = args.lr_scheduler_kwargs or {}
        get_scheduler(
            args.lr_scheduler_type, optimiser, 1, 10, scheduler_specific_kwargs=further
        )
    except (TypeError, ValueError, AttributeError, KeyError, ImportError) as e:
        raise InputError(
            "--trainer: transformers rejects the optimiser (optim, adam_*) or the schedule "
            f"(lr_scheduler_type, lr_scheduler_kwargs): {one_line(e)}"
        ) from e


def is_sharded(settings: Mapping[str, Any]) -> bool:
    """Whether FSDP or DeepSpeed shards the training, and so places the model on the devices."""
    given = [
        os.environ.get(f"ACCELERATE_USE_{n}", "").lower() for n in ("FSDP", "DEEPSPEED")
    ]
    return bool(settings.get("fsdp") or settings.get("deepspeed")) or "true" in given


EPOCHS = 4.0
"""Maximum number of epochs for a budget; more repetition hardly helps."""
SHORT = 256
"""Minimum sample length for a budget, in tokens."""
LEAST_STEPS = 10
"""Minimum number of steps of a training in a time; with fewer, the model stays unchanged."""
# How many times as many steps as expected a training in a time may make.
_FASTER = 2
# Default sequences per step.
_BATCH = 16
# Tokens of the largest step, and the approximate number of steps for few tokens.
_MOST = 16384
_STEPS = 40
# Tokens per step below which the learning rate is reduced.
_CALM = 2048


def usual_recipe(job: Job) -> HealingRecipe:
    """Return the recipe without a budget: one epoch at 2e-5, as in the paper (LoRA: 2e-4)."""
    text = job.tokens
    processes = job.processes.size
    settings = trainer_settings(job.config)
    batch = _batch(settings, processes) or processes * math.ceil(_BATCH / processes)
    steps = settings.get("max_steps") or _steps(
        text, batch, settings.get("num_train_epochs", 1.0)
    )
    rate = settings.get("learning_rate") or (2e-4 if job.config.lora_rank else 2e-5)
    samples = steps * batch
    tokens = int(samples * int(text.mask.sum()) / text.samples)
    length = int(text.mask.sum(1).max())
    return HealingRecipe(
        steps=steps,
        batch=batch,
        length=length,
        learning_rate=float(rate),
        tokens=tokens,
        seconds=None,
        epochs=samples / text.samples,
    )


def sizes(
    config: HealConfig,
    tokens: float,
    *,
    width: int,
    longest: int = LENGTH,
    processes: int = 1,
) -> tuple[int, int, float]:
    """Choose batch, length and learning rate for a number of tokens.

    The tokens per step grow with the square root of all tokens, 2,048 for 80,000 and 8,192 for 1.3
    million, with about 40 steps or more. The rate falls with the number of tokens, from 3e-4 to the
    paper's 2e-5. It is lower for wider models, because of Adam's step size, and for few tokens per
    step. Values in the options are used unchanged.

    Args:
        width: width of the residual stream.
        longest: tokens of the longest sequence.
        processes: number of processes that share a batch.
    """
    settings = trainer_settings(config)
    tokens = max(1.0, tokens)
    step = 2 ** round(math.log2(min(7.2 * math.sqrt(tokens), tokens / _STEPS)))
    step = min(_MOST, max(SHORT, step))
    length = longest if config.length else min(longest, max(SHORT, step // 8))
    batch = _batch(settings, processes) or processes * math.ceil(
        step / (length * processes)
    )
    scale = 10.0 if config.lora_rank else 1.0
    rate = min(3e-4, 0.086 / math.sqrt(tokens)) * min(1.0, 576 / width)
    # Gradients of few tokens are mostly noise.
    rate *= math.sqrt(min(1.0, batch * length / _CALM))
    rate = float(f"{min(1e-3, scale * max(2e-5, rate)):.2g}")
    return batch, length, float(settings.get("learning_rate", rate))


def choose_recipe(job: Job, tokens: float, seconds: float | None) -> HealingRecipe:
    """Choose the recipe to train a job on so many tokens, or on a few epochs if these are fewer.

    Args:
        seconds: time for these tokens, for a budget in time.
    """
    config = job.config
    text = job.tokens
    epochs = trainer_settings(config).get("num_train_epochs", EPOCHS)
    batch, length, rate = sizes(
        config,
        min(tokens, epochs * int(text.mask.sum())),
        width=int(text_config(job.teacher.model).hidden_size),
        longest=int(text.mask.sum(1).max()),
        processes=job.processes.size,
    )
    cut = pieces(text, length)
    step = batch * float(cut.mask.sum()) / cut.samples
    most = _steps(cut, batch, epochs)
    steps = max(1, int(tokens / step))
    if seconds is not None:
        # The clock ends the training, so the plan has more steps than expected, or none.
        enough = tokens / step >= min(LEAST_STEPS, most)
        steps = _FASTER * steps * enough
    steps = min(steps, most)
    return HealingRecipe(
        steps=steps,
        batch=batch,
        length=length,
        learning_rate=rate,
        tokens=int(steps * step),
        seconds=seconds,
        epochs=steps * batch / cut.samples,
    )


def _batch(settings: Mapping[str, Any], processes: int) -> int | None:
    """Return the sequences per step that TrainingArguments set; None if they set none."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    if not any(name in settings for name in names):
        return None
    each, parts = (int(settings.get(n, d)) for n, d in zip(names, (8, 1), strict=True))
    return processes * each * parts


def _steps(text: TokenSet, batch: int, epochs: float) -> int:
    return max(1, math.ceil(math.ceil(text.samples / batch) * epochs))


def stored_dtype(folder: Path) -> str:
    """Return the dtype of most of a checkpoint's weights, by its name in safetensors files.

    Raises:
        InputError: the weights are quantised, so they cannot be trained.
    """
    sizes: dict[str, int] = {}
    for tensor in read_checkpoint(folder).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    name = max(sizes, key=lambda k: sizes[k])
    if name not in PLAIN:
        raise InputError(
            f"{folder} has {name} weights, which cannot be trained; cut and heal the unquantised "
            "model (the teacher may be quantised)"
        )
    return name
