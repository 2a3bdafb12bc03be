"""The training loop of a distillation: transformers' Trainer with our loss, data and records."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from isingcut.errors import InputError
from isingcut.files.writing import clear_os_errors, read_json
from isingcut.healing.job import Job
from isingcut.healing.patch.files import runs
from isingcut.healing.recipe import steps_of
from isingcut.healing.trainer_file import is_sharded, trainer_settings
from isingcut.healing.training.batches import Rows, Steps, TimedSteps, collate
from isingcut.healing.training.room import Way, way_of
from isingcut.healing.training.rounds import Objective, install
from isingcut.healing.training.student import load_student, narrow, trainable
from isingcut.healing.training.targets import Kept, keep_targets, parked
from isingcut.healing.training.watch import OurTrainer, Watch
from isingcut.healing.work_folder import CURVE, complete_states, kept
from isingcut.models.cutting.sharing import share
from isingcut.models.device import BatchLimit
from isingcut.models.loading import quiet_transformers
from isingcut.models.replay import reuse_freed_memory
from isingcut.models.transformers_private import checkpointing

# Trained tokens that a check is worth its time after.
_EACH_CHECK = 100_000
# Files of a state that are no part of the model in it.
_OF_STATES = ("optimizer*", "scheduler*", "rng_state*", "trainer_state*", "global_step*", CURVE)


def train(job: Job, out: Path) -> dict[str, Any]:
    """Train, and leave the Trainer's save of the final model (LoRA: of the adapter) at ``out``.

    Returns:
        the curve and the settings, as `healing.json` keeps them.

    Raises:
        InputError: settings that do not fit each other, or the number of processes.
        ModelError: the loss is no number.
    """
    config, size = job.config, job.processes.size
    if config.sequences % size:
        raise InputError(
            f"--batch {config.sequences} must be a multiple of the number of processes, here {size}"
        )
    answers = keep_targets(job) if config.top_k else None
    with contextlib.nullcontext() if answers is None else parked(job):
        found = _trained(job, answers, out)
        # The student and its optimiser, before anything takes their place.
        BatchLimit(job.teacher.device).release()
    return found


def _trained(job: Job, answers: Kept | None, out: Path) -> dict[str, Any]:
    """`train` with the teacher's kept answers, or beside the teacher."""
    config, size = job.config, job.processes.size
    watch = Watch(job, "healing")
    with _student(job, answers) as (student, rows, way):
        order = Steps(
            job.tokens.mask.sum(1).tolist(),
            config.sequences,
            steps_of(config, job.tokens.samples),
            job.processes.rank,
            size,
            config.seed,
            way.most,
        ).parted()
        _run(job, student, rows, way, order, watch, out)
        trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return {
        "steps": watch.curve,
        "tokens_seen": watch.curve[-1]["tokens"] if watch.curve else 0,
        "samples": job.tokens.samples,
        "processes": size,
        "trained_parameters": trained,
        "checks": watch.checks,
        **({"stopped": dataclasses.asdict(watch.verdict)} if watch.verdict else {}),
    }


def step_times(job: Job) -> list[tuple[int, float]]:
    """Tokens and seconds of steps that come to nothing: of one sample, then of many."""
    size = job.processes.size
    job = dataclasses.replace(job, config=job.config.replace(batch=64 * size))
    watch = Watch(job, "timing", timing=True)
    with _student(job, None) as (student, rows, way):
        longest = int(job.tokens.mask.sum(1).max())
        order = TimedSteps(len(rows), max(1, way.most // longest), job.processes.rank, size)
        _run(job, student, rows, way, order, watch, None)
    counts = [0, *(step["tokens"] for step in watch.curve)]
    found = [(b - a, s) for a, b, s in zip(counts, counts[1:], watch.seconds, strict=False)]
    return job.processes.decide(lambda: found)


@contextlib.contextmanager
def _student(job: Job, answers: Kept | None) -> Iterator[tuple[Any, Rows, Way]]:
    """The model to train, with its loss installed and its attention chosen, its samples and way.

    On one device it is a second tree of modules over the teacher's weights: only what is trained,
    and what a patch or float32 made another, is new memory. What FSDP or DeepSpeed shard stays
    whole on the CPU, for them to place, in one type.
    """
    config, device = job.config, job.teacher.device
    reuse_freed_memory()
    # A training before this one, for its speed, is in memory until it is collected.
    BatchLimit(device).release()
    plain = load_student(job.start, config)
    student = trainable(plain, config)
    teacher = job.teacher.model if answers is None else None
    half = job.teacher.dtype == torch.bfloat16
    placed = False
    if not is_sharded(config):
        if half:
            narrow(plain, torch.bfloat16)
        placed = share(plain, job.teacher.model, job.removed, device)
    objective = Objective(teacher, config.temperature, _pairs(job), config.hidden_weight)
    # Narrowed layers take float32 under autocast alone.
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        install(student, plain, objective)
    with quiet_transformers():
        rows = Rows(job.tokens, answers)
        yield student, rows, _way(job, student, rows, placed=placed)


def _run(
    job: Job,
    student: Any,
    rows: Rows,
    way: Way,
    order: Steps | TimedSteps,
    watch: Watch,
    out: Path | None,
) -> None:
    """Train from the last complete state on, and save the model; without ``out`` keep nothing."""

    def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        predictions = (labels != -100).sum()
        watch.count(outputs["loss"], predictions)
        scaled: Tensor = outputs["loss"] / (
            predictions if num_items_in_batch is None else num_items_in_batch
        )
        return scaled

    trainer = OurTrainer(
        order=order,
        model=student,
        args=_arguments(job, way, order, saved=out is not None),
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
        known = read_json(last / CURVE, "healing-curve")
        watch.curve, watch.checks = known["steps"], known["checks"]
    # A kill between a verdict and what follows from it leaves it to be read here.
    if watch.judged() is None:
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except ImportError as e:
            raise _refused(e) from e
    if out is None:
        return
    with clear_os_errors(out):
        if watch.verdict is None:
            trainer.save_model(str(out))
        elif job.leads and watch.verdict.kept != 0:
            step = watch.verdict.kept or watch.curve[-1]["step"]
            state = job.work / "trainer" / f"checkpoint-{step}"
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(state, out, ignore=shutil.ignore_patterns(*_OF_STATES))
    job.processes.wait()


def _last_state(job: Job) -> Path | None:
    """The last complete state of this training; all others are deleted."""
    folder = job.work / "trainer"
    if job.leads:
        complete = complete_states(folder, job.identity)
        for path in folder.glob("checkpoint-*"):
            if path not in complete:
                shutil.rmtree(path)
    job.processes.wait()
    return next(reversed(complete_states(folder, job.identity)), None)


def _way(job: Job, student: Any, rows: Rows, *, placed: bool) -> Way:
    """How the training is computed: as it was when it was begun, and in every process alike."""

    def made() -> dict[str, Any]:
        return dataclasses.asdict(way_of(job, student, rows.longest(), placed=placed))

    def found() -> dict[str, Any]:
        # A student that finds no room now is refused, whatever there was.
        fits = placed or is_sharded(job.config)
        return kept(job.work / "way.json", made) if fits else made()

    return Way(**job.processes.decide(found))


def _arguments(job: Job, way: Way, order: Steps | TimedSteps, *, saved: bool) -> TrainingArguments:
    config, size, steps = job.config, job.processes.size, order.steps
    device = job.teacher.device
    settings: dict[str, Any] = {
        "output_dir": str(job.work / "trainer"),
        "per_device_train_batch_size": -(-config.sequences // (size * order.micro_batches)),
        "gradient_accumulation_steps": order.micro_batches,
        "learning_rate": config.rate,
        "lr_scheduler_type": config.schedule,
        "warmup_steps": min(config.warmup_steps, steps // 10),
        "max_steps": steps,
        "weight_decay": 0.0,
        "logging_strategy": "no",
        "save_strategy": "steps" if saved else "no",
        "save_steps": config.save_steps or _between_saves(job, steps),
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
    settings |= trainer_settings(config)
    try:
        arguments = TrainingArguments(**settings)
        if arguments.n_gpu > 1:
            # DataParallel would copy the model without its loss; a launcher uses all GPUs.
            arguments._n_gpu = 1
        return arguments
    except (TypeError, ValueError, ImportError) as e:
        raise _refused(e) from e


def _between_saves(job: Job, steps: int) -> int:
    """Steps between two states, each of which is checked: two to ten, or one every 50 steps."""
    mean = float(job.tokens.mask.sum()) / job.tokens.samples
    wanted = steps * job.config.sequences * mean / _EACH_CHECK
    return min(50, math.ceil(steps / min(10.0, max(2.0, wanted))))


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
