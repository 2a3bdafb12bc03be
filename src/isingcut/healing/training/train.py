"""The training loop of a distillation: transformers' Trainer with our loss, data and records."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from isingcut.console.progress import Bar
from isingcut.errors import InputError, ModelError
from isingcut.files.inputs import user_path
from isingcut.files.outputs import mark
from isingcut.files.writing import clear_os_errors, read_json, write_json
from isingcut.healing.job import Job
from isingcut.healing.patch.files import runs
from isingcut.healing.trainer_file import read_trainer_file
from isingcut.healing.training.batches import Rows, Steps, collate
from isingcut.healing.training.room import Way, way_of
from isingcut.healing.training.rounds import Objective, install
from isingcut.healing.training.student import load_student, trainable
from isingcut.healing.training.targets import keep_targets
from isingcut.healing.work_folder import complete_states, kept
from isingcut.models.compute.attention import NAME, attending, pays_in_training
from isingcut.models.loading import quiet_transformers
from isingcut.models.replay import reuse_freed_memory
from isingcut.models.text_alone import text_model
from isingcut.models.transformers_private import checkpointing

_CURVE = "healing-curve.json"


class _Trainer(Trainer):
    """Saves states that a kill or a full disk leaves whole or recognisably unfinished.

    Args:
        order: this process's micro-batches.
    """

    def __init__(self, order: Steps, **rest: Any) -> None:
        super().__init__(**rest)
        self.order = order

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Micro-batches as they are: what is dealt to this process already is not dealt again."""
        arguments: Any = self.args
        workers = arguments.dataloader_num_workers
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.order,
            collate_fn=collate,
            num_workers=workers,
            pin_memory=arguments.dataloader_pin_memory,
            persistent_workers=bool(workers and arguments.dataloader_persistent_workers),
            prefetch_factor=arguments.dataloader_prefetch_factor if workers else None,
        )

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
    config, device = job.config, job.teacher.device
    if config.batch % job.processes.size:
        raise InputError(
            f"--batch {config.batch} must be a multiple of the number of processes, here "
            f"{job.processes.size}"
        )
    reuse_freed_memory()
    answers = keep_targets(job) if config.top_k else None
    plain = load_student(job.start, config)
    student = trainable(plain, config)
    plain.to(device)
    original: Any = job.teacher.model
    teacher = None if answers is not None else original.to(device)
    half = job.teacher.dtype == torch.bfloat16
    pays = pays_in_training(text_model(plain), int(job.tokens.mask.sum(1).max()), half=half)
    objective = Objective(teacher, config.temperature, _pairs(job), config.hidden_weight)
    install(student, plain, objective)
    with (
        quiet_transformers(),
        attending(plain, NAME if pays else None),
        attending(plain if teacher is None else teacher, NAME if pays else None),
    ):
        watch = _Watch(job, device)
        _run(job, student, Rows(job.tokens, answers), watch, out)
    return {
        "steps": watch.curve,
        "tokens_seen": watch.curve[-1]["tokens"] if watch.curve else 0,
        "samples": job.tokens.samples,
        "processes": job.processes.size,
        "trained_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
    }


def _run(job: Job, student: Any, rows: Rows, watch: _Watch, out: Path) -> None:
    """Train from the last complete state on, and save the model."""
    way = _way(job, student, rows)
    order = Steps(
        job.tokens.mask.sum(1).tolist(),
        job.config.batch,
        steps_of(job.config, job.tokens.samples),
        job.processes.rank,
        job.processes.size,
        job.config.seed,
        way.most,
    ).parted()

    def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        predictions = (labels != -100).sum()
        watch.count(outputs["loss"], predictions)
        scaled: Tensor = outputs["loss"] / (
            predictions if num_items_in_batch is None else num_items_in_batch
        )
        return scaled

    trainer = _Trainer(
        order=order,
        model=student,
        args=_arguments(job, way, order),
        train_dataset=rows,
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
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except ImportError as e:
        raise _refused(e) from e
    with clear_os_errors(out):
        trainer.save_model(str(out))


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


def _way(job: Job, student: Any, rows: Rows) -> Way:
    """How the training is computed: as it was when it was begun, and in every process alike."""

    def made() -> dict[str, Any]:
        return dataclasses.asdict(way_of(job, student, rows.longest()))

    return Way(**job.processes.decide(lambda: kept(job.work / "way.json", made)))


def _arguments(job: Job, way: Way, order: Steps) -> TrainingArguments:
    config, size, steps = job.config, job.processes.size, order.steps
    device = job.teacher.device
    settings: dict[str, Any] = {
        "output_dir": str(job.work / "trainer"),
        "per_device_train_batch_size": -(-config.batch // (size * order.micro_batches)),
        "gradient_accumulation_steps": order.micro_batches,
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
        **(checkpointing() if way.recompute else {}),
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
