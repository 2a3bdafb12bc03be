"""The training loop of a distillation: transformers' Trainer with our loss, data and records."""

from __future__ import annotations

import contextlib
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from isingcut.console.progress import Bar
from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError, ModelError
from isingcut.files.inputs import user_path
from isingcut.files.outputs import mark
from isingcut.files.writing import clear_os_errors, read_json, write_json
from isingcut.healing.job import Job
from isingcut.healing.patch.files import runs
from isingcut.healing.trainer_file import read_trainer_file
from isingcut.healing.training.rounds import Objective, install
from isingcut.healing.training.student import load_student, trainable
from isingcut.healing.training.targets import Kept, keep_targets
from isingcut.healing.work_folder import complete_states
from isingcut.models.loading import quiet_transformers
from isingcut.models.transformers_private import checkpointing

_CURVE = "healing-curve.json"


class _Trainer(Trainer):
    """Saves states that a kill or a full disk leaves whole or recognisably unfinished."""

    def _save_checkpoint(self, *arguments: Any, **rest: Any) -> None:
        # `_Watch.on_save` marks it complete; one left by an earlier call is no part of it.
        target = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        save: Any = super()._save_checkpoint
        try:
            with clear_os_errors(target):
                save(*arguments, **rest)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise


class Rows(Dataset[dict[str, Tensor]]):
    """Samples as the Trainer takes them, without padding.

    Args:
        tokens: the samples.
        kept: the teacher's stored targets, None where the teacher itself is at hand.
    """

    def __init__(self, tokens: TokenSet, kept: Kept | None = None) -> None:
        self.tokens, self.kept = tokens, kept

    def __len__(self) -> int:
        return self.tokens.samples

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        length = int(self.tokens.mask[i].sum())
        row = {"input_ids": self.tokens.input_ids[i, :length]}
        if self.kept is not None:
            row |= {name: t[:length] for name, t in self.kept.sample(i).items()}
        return row


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, padded on the right; ``labels`` are -100 but where a prediction counts."""
    width = max(len(r["input_ids"]) for r in rows)

    def padded(values: Tensor) -> Tensor:
        rest = values.new_zeros((width - len(values), *values.shape[1:]))
        return torch.cat([values, rest])

    batch = {name: torch.stack([padded(r[name]) for r in rows]) for name in rows[0]}
    mask = torch.stack([padded(torch.ones_like(r["input_ids"])) for r in rows])
    labels = batch["input_ids"].masked_fill(mask == 0, -100)
    # The first token of a row is never predicted; the count of the others scales the loss.
    labels[:, 0] = -100
    return {**batch, "attention_mask": mask, "labels": labels}


class _Watch(TrainerCallback):
    """Keeps the loss curve, shows progress and refuses a loss that is no number."""

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job = job
        self.bar: Bar | None = None
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.curve: list[dict[str, Any]] = []
        self.shown: Any = contextlib.ExitStack()

    def count(self, loss: Tensor, predictions: Tensor) -> None:
        """Add a micro-batch's summed loss and its predictions."""
        self.sums += torch.stack([loss.detach().double(), predictions.double()])

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        words = f"healing, {state.max_steps} steps of {self.job.config.batch} sequences"
        if self.job.leads:
            self.bar = self.shown.enter_context(self.job.progress(words, state.max_steps))
            if state.global_step:
                self.bar.advance(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        sums = self.sums.float() if self.sums.device.type == "mps" else self.sums.clone()
        if self.job.processes.size > 1:
            torch.distributed.all_reduce(sums)
        self.sums.zero_()
        total, predictions = (float(v) for v in sums)
        loss = total / max(1.0, predictions)
        before = self.curve[-1]["tokens"] if self.curve else 0
        self.curve.append(
            {"step": state.global_step, "tokens": before + int(predictions), "loss": loss}
        )
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss of step {state.global_step} is {loss}; lower --learning-rate, here "
                f"{self.job.config.rate:g}"
            )
        if self.bar is not None:
            self.bar.advance(1, f"loss {loss:.4f}")

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        # The other processes have written their random states, too.
        self.job.processes.wait()
        if self.job.leads:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_json(folder / _CURVE, "healing-curve", {"steps": self.curve})
            mark(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown.close()


def train(job: Job, out: Path) -> dict[str, Any]:
    """Train, and leave the Trainer's save of the final model (LoRA: of the adapter) at ``out``.

    Returns:
        the curve and the settings, as `healing.json` keeps them.

    Raises:
        InputError: settings that do not fit each other, or the number of processes.
        ModelError: the loss is no number.
    """
    config = job.config
    arguments = _arguments(job)
    kept = keep_targets(job) if config.top_k else None
    plain = load_student(job.start, config)
    student = trainable(plain, config)
    plain.to(arguments.device)
    original: Any = job.teacher.model
    teacher = None if kept is not None else original.to(arguments.device)
    objective = Objective(teacher, config.temperature, _pairs(job), config.hidden_weight)
    install(student, plain, objective)
    watch = _Watch(job, arguments.device)

    def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        predictions = (labels != -100).sum()
        watch.count(outputs["loss"], predictions)
        scaled: Tensor = outputs["loss"] / (
            predictions if num_items_in_batch is None else num_items_in_batch
        )
        return scaled

    with quiet_transformers():
        trainer = _Trainer(
            model=student,
            args=arguments,
            train_dataset=Rows(job.tokens, kept),
            data_collator=collate,
            compute_loss_func=summed,
            callbacks=[watch],
        )
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
                trainer.remove_callback(callback)
        last = _last_state(job)
        if last is not None:
            watch.curve = read_json(last / _CURVE, "healing-curve")["steps"]
        resumed: Any = None if last is None else str(last)
        try:
            trainer.train(resume_from_checkpoint=resumed)
        except ImportError as e:
            raise _refused(e) from e
        with clear_os_errors(out):
            trainer.save_model(str(out))
    return {
        "steps": watch.curve,
        "tokens_seen": watch.curve[-1]["tokens"] if watch.curve else 0,
        "samples": job.tokens.samples,
        "processes": job.processes.size,
        "trained_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
    }


def _last_state(job: Job) -> Path | None:
    """The last complete state of a training; unfinished ones are deleted."""
    folder = job.work / "trainer"
    if job.leads:
        complete = complete_states(folder)
        for path in folder.glob("checkpoint-*"):
            if path not in complete:
                shutil.rmtree(path)
    job.processes.wait()
    return next(reversed(complete_states(folder)), None)


def steps_of(config: Any, samples: int) -> int:
    """Optimiser steps of a training."""
    if config.steps is not None:
        return int(config.steps)
    return max(1, math.ceil(math.ceil(samples / int(config.batch)) * float(config.epochs)))


def _arguments(job: Job) -> TrainingArguments:
    config, size = job.config, job.processes.size
    together = config.micro_batch * size
    if config.batch % together:
        raise InputError(
            f"--batch {config.batch} must be a multiple of --micro-batch times the number of "
            f"processes, here {config.micro_batch} x {size} = {together}"
        )
    steps = steps_of(config, job.tokens.samples)
    device = job.teacher.device
    settings: dict[str, Any] = {
        "output_dir": str(job.work / "trainer"),
        "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.batch // together,
        "learning_rate": config.rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": min(config.warmup_steps, steps // 10),
        "max_steps": steps,
        "weight_decay": 0.0,
        "logging_strategy": "no",
        "save_strategy": "steps",
        "save_steps": config.save_steps,
        "save_total_limit": 2,
        "seed": config.seed,
        "data_seed": config.seed,
        "bf16": job.teacher.dtype == torch.bfloat16,
        **(checkpointing() if config.gradient_checkpointing else {}),
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    if size > 1:
        settings["ddp_find_unused_parameters"] = False
    if config.trainer:
        settings |= read_trainer_file(user_path(config.trainer))
    try:
        arguments = TrainingArguments(**settings)
        if arguments.n_gpu > 1:
            # DataParallel would copy the model without its loss; a launcher uses all GPUs.
            arguments._n_gpu = 1
        return arguments
    except (TypeError, ValueError, ImportError) as e:
        raise _refused(e) from e


def _refused(error: Exception) -> InputError:
    words = " ".join(str(error).split())
    return InputError(f"transformers refuses the training arguments: {words}")


def _pairs(job: Job) -> list[tuple[int, int]]:
    """(block of the student, block of the teacher) that stand right before and behind each cut."""
    found = []
    for first, last in runs(job.removed):
        before = first - 1 - sum(i < first for i in job.removed)
        if before >= 0:
            found.append((before, last))
    return found
