"""The training loop of a distillation: transformers' Trainer with our loss, data and records."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from isingcut.console.progress import Bar
from isingcut.errors import InputError, ModelError
from isingcut.files.writing import clear_os_errors, mark, read_json, write_json
from isingcut.healing.job import Job
from isingcut.healing.judging import Verdict
from isingcut.healing.recipe import usual_recipe
from isingcut.healing.trainer_file import is_sharded, trainer_settings
from isingcut.healing.training.batches import Rows, Steps, TimedSteps, collate
from isingcut.healing.training.loss import install
from isingcut.healing.training.memory import MemoryPlan, plan_memory
from isingcut.healing.training.student import load_student, narrow, prepare_training
from isingcut.healing.work_folder import CURVE, complete_states, keep_result
from isingcut.models.cutting.sharing import share
from isingcut.models.device import BatchLimit
from isingcut.models.loading import one_line, quiet_transformers
from isingcut.models.replay import reuse_freed_memory
from isingcut.models.transformers_private import checkpointing

# Trained tokens that a check is worth its time after.
_EACH_CHECK = 100_000


def train(job: Job) -> tuple[dict[str, Any], Path]:
    """Train, from the last complete state on.

    Returns:
        the curve and the settings, as `healing.json` keeps them; and the Trainer's save of the
        model (LoRA: of the adapter) that is the result.

    Raises:
        InputError: settings that do not fit each other.
        ModelError: the loss is no number.
    """
    recipe = job.recipe or usual_recipe(job.config, job.tokens, job.processes.size)
    job = dataclasses.replace(job, recipe=recipe)
    watch = Watch(job, "healing", recipe.batch)
    last = _last_state(job)
    if last is not None:
        known = read_json(last / CURVE, "healing-curve")
        watch.curve, watch.checks = known["steps"], known["checks"]
        watch.trained = known["trained_parameters"]
    # A kill behind the last state leaves what follows from it to be done here.
    if watch.judge() is None and len(watch.curve) < recipe.steps:
        with _student(job, recipe.batch) as (student, rows, plan):
            watch.trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
            order = Steps(
                job.tokens.mask.sum(1).tolist(),
                recipe.batch,
                recipe.steps,
                job.processes.rank,
                job.processes.size,
                job.config.seed,
                plan.most,
            ).divide()
            _run(job, student, rows, plan, order, watch, last)
        # The student and its optimiser, before anything takes their place.
        del student
        BatchLimit(job.teacher.device).release()
    step = watch.curve[-1]["step"]
    if watch.verdict and watch.verdict.kept is not None:
        step = watch.verdict.kept
    found = {
        "steps": watch.curve,
        "tokens_seen": watch.curve[-1]["tokens"],
        "samples": job.tokens.samples,
        "processes": job.processes.size,
        "trained_parameters": watch.trained,
        "checks": watch.checks,
        **({"stopped": dataclasses.asdict(watch.verdict)} if watch.verdict else {}),
    }
    return found, job.work / "trainer" / f"checkpoint-{step}"


def step_times(job: Job) -> list[tuple[int, float]]:
    """Tokens and seconds of steps that come to nothing: of one sample, then of many."""
    size = job.processes.size
    batch = 64 * size
    watch = Watch(job, "timing", batch, timing=True)
    with _student(job, batch) as (student, rows, plan):
        longest = int(job.tokens.mask.sum(1).max())
        order = TimedSteps(len(rows), max(1, plan.most // longest), job.processes.rank, size)
        _run(job, student, rows, plan, order, watch)
    counts = [0, *(step["tokens"] for step in watch.curve)]
    found = [(b - a, s) for a, b, s in zip(counts, counts[1:], watch.seconds, strict=False)]
    return job.processes.decide(lambda: found)


@contextlib.contextmanager
def _student(job: Job, batch: int) -> Iterator[tuple[Any, Rows, MemoryPlan]]:
    """The model to train, with its loss installed and its attention chosen, its samples and plan.

    On one device it is a second tree of modules over the teacher's weights: only what is trained,
    and what a patch or float32 made another, is new memory. What FSDP or DeepSpeed shard stays
    whole on the CPU, for them to place, in one type.
    """
    config, device, teacher = job.config, job.teacher.device, job.teacher.model
    reuse_freed_memory()
    # A training before this one, for its speed, is in memory until it is collected.
    BatchLimit(device).release()
    plain = load_student(job.start, config)
    student = prepare_training(plain, config)
    half = job.teacher.dtype == torch.bfloat16
    sharded, placed = is_sharded(trainer_settings(config)), False
    if not sharded:
        if half:
            narrow(plain, torch.bfloat16)
        placed = share(plain, teacher, job.removed, device)
    # Narrowed layers take float32 under autocast alone.
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        install(student, plain, teacher)
    rows = Rows(job.tokens)

    def make() -> dict[str, Any]:
        found = plan_memory(job, student, rows.longest(), batch, placed=placed)
        return dataclasses.asdict(found)

    def plan() -> dict[str, Any]:
        # As it was when it was begun; a student that finds no room now is refused, whatever was.
        return keep_result(job.work / "memory.json", make) if placed or sharded else make()

    with quiet_transformers():
        yield student, rows, MemoryPlan(**job.processes.decide(plan))


def _run(
    job: Job,
    student: Any,
    rows: Rows,
    plan: MemoryPlan,
    order: Steps | TimedSteps,
    watch: Watch,
    last: Path | None = None,
) -> None:
    """Train, from a state on where there is one."""

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
        args=_arguments(job, plan, order, watch.batch, saved=not watch.timing),
        train_dataset=rows,
        data_collator=collate,
        compute_loss_func=summed,
        callbacks=[watch],
    )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(callback)
    try:
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except ImportError as e:
        raise _refused(e) from e


def _last_state(job: Job) -> Path | None:
    """The last complete state of this training; what is no complete state is deleted."""
    folder = job.work / "trainer"
    if job.leads:
        complete = complete_states(folder)
        for path in folder.glob("checkpoint-*"):
            if path not in complete:
                shutil.rmtree(path)
    job.processes.wait()
    return next(reversed(complete_states(folder)), None)


def _arguments(
    job: Job, plan: MemoryPlan, order: Steps | TimedSteps, batch: int, *, saved: bool
) -> TrainingArguments:
    config, size, steps = job.config, job.processes.size, order.steps
    device, rate = job.teacher.device, job.recipe.learning_rate if job.recipe else 2e-5
    settings: dict[str, Any] = {
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(100, steps // 10),
        "weight_decay": 0.0,
        "save_steps": _between_saves(job, steps, batch),
        "bf16": job.teacher.dtype == torch.bfloat16,
        **(checkpointing() if plan.recompute else {}),
        "dataloader_pin_memory": device.type == "cuda",
        **({"ddp_find_unused_parameters": False} if size > 1 else {}),
        **trainer_settings(config),
        "output_dir": str(job.work / "trainer"),
        "per_device_train_batch_size": -(-batch // (size * order.micro_batches)),
        "gradient_accumulation_steps": order.micro_batches,
        "max_steps": steps,
        "logging_strategy": "no",
        "save_strategy": "steps" if saved else "no",
        "save_total_limit": 2,
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": device.type == "cpu",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    try:
        arguments = TrainingArguments(**settings)
        if arguments.n_gpu > 1:
            # DataParallel would copy the model without its loss; a launcher uses all GPUs.
            arguments._n_gpu = 1
        return arguments
    except (TypeError, ValueError, ImportError) as e:
        raise _refused(e) from e


def _between_saves(job: Job, steps: int, batch: int) -> int:
    """Steps between two states, each of which is checked: two to ten, or one every 50 steps."""
    mean = float(job.tokens.mask.sum()) / job.tokens.samples
    wanted = steps * batch * mean / _EACH_CHECK
    return min(50, math.ceil(steps / min(10.0, max(2.0, wanted))))


def _refused(error: Exception) -> InputError:
    return InputError(f"transformers refuses the training arguments: {one_line(error)}")


def loss_at_the_end(losses: Sequence[float], steps: int) -> float | None:
    """An estimate of the last steps' loss: a power law through those so far, without the warm-up.

    None as long as they are fewer than eight or than a fifth of all, or where they do not fall.
    """
    made = len(losses)
    if made < max(8, steps / 5):
        return None
    first = max(2, made // 10)
    step = np.log(np.arange(first, made + 1))
    slope, constant = np.polyfit(step, np.log(np.maximum(losses[first - 1 :], 1e-30)), 1)
    return None if slope >= 0 else float(np.exp(constant + slope * math.log(steps)))


class OurTrainer(Trainer):
    """Saves states that a kill or a full disk leaves whole or recognisably unfinished.

    Args:
        order: this process's micro-batches.
    """

    def __init__(self, order: Steps | TimedSteps, **rest: Any) -> None:
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
        # `Watch.on_save` marks it complete; one left by an earlier call is no part of it.
        target = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        save: Any = super()._save_checkpoint
        try:
            with clear_os_errors(target):
                save(*arguments, **rest)
        except BaseException:
            shutil.rmtree(target, ignore_errors=True)
            raise


class Watch(TrainerCallback):
    """Keeps the loss curve, shows progress, judges, and refuses a loss that is no number.

    Args:
        words: what is shown.
        batch: sequences of a step, over all processes.
        timing: nothing is trained to be kept.
    """

    def __init__(self, job: Job, words: str, batch: int, *, timing: bool = False) -> None:
        self.job, self.words, self.batch, self.timing = job, words, batch, timing
        device = job.teacher.device
        self.bar: Bar | None = None
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.curve: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.began = time.monotonic()
        self.checks: list[dict[str, Any]] = []
        self.trained = 0
        self.verdict: Verdict | None = None
        self.shown: Any = contextlib.ExitStack()

    def count(self, loss: Tensor, predictions: Tensor) -> None:
        """Add a micro-batch's summed loss and its predictions."""
        self.sums += torch.stack([loss.detach().double(), predictions.double()])

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.began = time.monotonic()
        if self.job.leads:
            longest = int(self.job.tokens.mask.sum(1).max())
            words = f"{self.words}, {state.max_steps} steps"
            if not self.timing:
                words += f" of {self.batch} x {longest} tokens"
            self.bar = self.shown.enter_context(self.job.progress(words, state.max_steps))
            if state.global_step:
                self.bar.advance(state.global_step)
        if not state.global_step:
            self.check(rest["model"], 0)
            self.began = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        sums = self.sums.clone()
        if self.job.processes.size > 1:
            torch.distributed.all_reduce(sums)
        self.sums.zero_()
        total, predictions = (float(v) for v in sums)
        now = time.monotonic()
        self.seconds.append(now - self.began)
        self.began = now
        loss = total / max(1.0, predictions)
        before = self.curve[-1]["tokens"] if self.curve else 0
        self.curve.append(
            {"step": state.global_step, "tokens": before + int(predictions), "loss": loss}
        )
        self._refuse_no_number(loss, state.global_step)
        if self.bar is not None:
            end = loss_at_the_end([c["loss"] for c in self.curve], state.max_steps)
            about = "" if end is None else f", at the end about {end:.2f}"
            self.bar.advance(1, f"loss {loss:.4f}{about}")

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        # The other processes have written their random states, too.
        self.job.processes.wait()
        self.check(rest["model"], state.global_step)
        if self.job.leads:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            found = {"steps": self.curve, "checks": self.checks, "trained_parameters": self.trained}
            write_json(folder / CURVE, "healing-curve", found)
            mark(folder)
        if self.judge() is not None:
            control.should_training_stop = True

    def check(self, model: Any, step: int) -> None:
        """Measure the text held out, in every process alike, as a model may be shared by all."""
        judge = self.job.judge
        if judge is None or self.timing:
            return
        rows, device = Rows(judge.tokens), self.job.teacher.device
        model.eval()
        with torch.no_grad():
            sums = [
                float(model(**{k: v.to(device) for k, v in collate([rows[i]]).items()})["loss"])
                for i in range(len(rows))
            ]
        model.train()
        for value in sums:
            self._refuse_no_number(value, step)
        sums = self.job.processes.decide(lambda: sums)
        self.checks.append({"step": step, "kl_sums": sums})

    def _refuse_no_number(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise ModelError(f"the loss of step {step} is {loss}; {lower_rate(self.job)}")

    def judge(self) -> Verdict | None:
        """What the checks so far say, kept as `verdict`."""
        if self.checks and self.job.judge is not None:
            self.verdict = self.job.judge.verdict(self.checks)
        return self.verdict

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown.close()


def lower_rate(job: Job) -> str:
    """What to do about numbers that are none."""
    rate = "" if job.recipe is None else f", here {job.recipe.learning_rate:g}"
    return f"set a lower learning_rate in the --trainer file{rate}"
