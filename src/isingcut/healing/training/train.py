"""Distil a cut checkpoint: train it on the original's next-token distributions, and write it.

The loss is KL(original || cut) per predicted token at temperature 1, over real tokens. The Trainer
of transformers trains: `accelerate launch`, FSDP and DeepSpeed configs, bfloat16, gradient
checkpointing and resuming work as with it. Full fine-tuning trains all weights in float32; LoRA
trains low-rank matrices on all linear layers, which are merged into the weights at the end.

A time budget is converted to steps by timing a few steps of the largest micro-batch. The clock ends
the training: after each step, the number of steps left is estimated again, and the learning-rate
schedule is moved so that it ends with them. The plan is kept in the work folder, so that a resumed
healing continues it.

Source: Jansen et al., arXiv 2602.00161, the retraining after the cut (one epoch, KL, temperature
1, learning rate 2e-5, cosine, 100 warm-up steps, length 1,024).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from isingcut.console.progress import Bar, duration
from isingcut.data.tokens import TokenSet, pieces
from isingcut.errors import InputError, ModelError, one_line
from isingcut.files.healings import (
    HealingCheck,
    HealingCurve,
    HealingMemory,
    HealingRecipe,
    HealingStop,
    Step,
)
from isingcut.files.ownership import mark
from isingcut.files.results import read_document, write_document
from isingcut.files.writing import atomic_folder
from isingcut.formats.architectures.blocks import language_model
from isingcut.formats.checkpoints import Checkpoint
from isingcut.formats.fp8 import DTYPES, read_tensor
from isingcut.formats.libraries import quiet_transformers
from isingcut.formats.transformers_private import get_checkpointing
from isingcut.healing.job import (
    LEAST_STEPS,
    SHORT,
    Job,
    choose_recipe,
    is_sharded,
    stored_dtype,
    trainer_settings,
    usual_recipe,
)
from isingcut.healing.training.batches import (
    Steps,
    batch_of,
    plan_memory,
)
from isingcut.healing.training.student import (
    install,
    load_student,
    load_trained,
    prepare_training,
    set_dtypes,
)
from isingcut.healing.work_folder import (
    CURVE,
    MEMORY,
    RECIPE,
    TRAINER,
    TRIAL,
    complete_states,
    keep_result,
)
from isingcut.models.device import BatchLimit
from isingcut.models.sharing import share
from isingcut.models.verify import check_generation, random_tokens, reload

Order = Steps | list[list[int]]
"""The micro-batches of a training, as sample indices."""

# Maximum number of timed steps, and share of the time after which no other begins.
_TIMED = 3
_TIMING = 0.1
# Files that `save_pretrained` or the training writes, so they are not copied from the start.
_REWRITTEN = ("config.json", "generation_config.json", "model.safetensors.index.json")
# Usable share of the remaining time: writing the result takes time too.
_USED = 0.9
# Intended number of trained tokens between two checks.
_EACH_CHECK = 100_000


def distill(job: Job, out: Path) -> dict[str, Any]:
    """Train the job's start checkpoint and write ``out``, a plain one of the same shapes and dtype.

    An interrupted training resumes from its last state. Every process calls this; rank 0 writes.

    Returns:
        the record for `healing.json`.
    """
    budget = bool(job.config.training.tokens or job.config.training.seconds)
    if budget:
        job = _spend(job)
    record, trained = train(job)
    if job.leads:
        if "stopped" in record and record["stopped"].kept == 0:
            shutil.copytree(job.start, out)
        else:
            _publish(job, trained, out)
    job.processes.wait()
    if budget:
        record["recipe"] = job.recipe
    return record


def _spend(job: Job) -> Job:
    """Return the job with a recipe for its budget, and its text in samples of that length."""
    began = time.monotonic()
    seconds = job.config.training.seconds
    tokens = job.config.training.tokens or math.inf
    file = job.work / RECIPE.file
    if seconds is not None and not job.processes.decide(file.exists):
        left = seconds - job.spent
        left = job.processes.decide(lambda: left)
        pace = measure_pace(job, _TIMING * left) if left > 0 else math.inf
        seconds = max(0.0, _USED * (left - (time.monotonic() - began)))
        tokens = seconds / pace

    make = partial(choose_recipe, job, tokens, seconds)
    kept = job.processes.decide(
        lambda: keep_result(file, HealingRecipe, make).content()
    )
    recipe = HealingRecipe(**kept)
    return dataclasses.replace(
        job, recipe=recipe, tokens=pieces(job.tokens, recipe.length)
    )


def _publish(job: Job, trained: Path, out: Path) -> None:
    """Write the trained weights as a plain checkpoint in the start's dtype, and verify the file."""
    dtype = DTYPES[stored_dtype(job.start)]
    trust = job.config.trust_remote_code
    weights = load_trained(job.start, trained, job.config)
    if not all(bool(torch.isfinite(t).all()) for t in weights.values()):
        raise ModelError(
            f"the last step left NaN or infinite weights; {lower_rate(job)}"
        )
    # Load into a model of that dtype, because transformers keeps some tensors in float32.
    model = reload(job.start, dtype=dtype, trust_remote_code=trust)
    model.load_state_dict(weights)
    tokens = random_tokens(model, 2, 24)
    with atomic_folder(out) as temporary, quiet_transformers():
        # The model was loaded without its layers for multi-token prediction: copy them unchanged.
        mtp = {
            n: read_tensor(t)
            for n, t in Checkpoint.read(job.start).mtp_tensors().items()
        }
        model.save_pretrained(
            temporary, state_dict=model.state_dict() | mtp if mtp else None
        )
        for path in sorted(job.start.iterdir()):
            copied = path.suffix != ".safetensors" and path.name not in _REWRITTEN
            if path.is_file() and copied:
                shutil.copyfile(path, temporary / path.name)
        again = reload(temporary, dtype=dtype, trust_remote_code=trust)
        with torch.no_grad():
            same = torch.equal(
                language_model(model)(tokens).logits,
                language_model(again)(tokens).logits,
            )
        if not same:
            raise ModelError(
                f"the healed model gives other logits after reloading it from {out}; it was "
                "deleted there"
            )
        check_generation(language_model(again), tokens[:1], 8, str(out))


def train(job: Job) -> tuple[dict[str, Any], Path]:
    """Train, or resume from the last complete state.

    Returns:
        the entries for `healing.json`; and the folder with the model that the Trainer saved (LoRA:
        the adapter).

    Raises:
        InputError: transformers rejects the settings, or the training does not fit the memory.
        ModelError: the loss is NaN or infinite.
    """
    recipe = job.recipe or usual_recipe(job)
    job = dataclasses.replace(job, recipe=recipe)
    watch = Watch(job, recipe)
    last = _last_state(job)
    if last is not None:
        watch.curve = read_document(last / CURVE, HealingCurve)
        watch.opened -= watch.curve.seconds
    # Skip the training if it was complete when the process was killed.
    if watch.judge() is None and watch.curve.left:
        with _student(job, recipe.batch) as (student, plan):
            watch.curve.trained_parameters = sum(
                p.numel() for p in student.parameters() if p.requires_grad
            )
            order = Steps(
                job.tokens.mask.sum(1).tolist(),
                recipe.batch,
                recipe.steps,
                job.processes.rank,
                job.processes.size,
                job.config.seed,
                plan.most,
            )
            _run(watch, student, plan, order, last)
        # Free the student and its optimiser before other objects need the memory.
        del student
        BatchLimit(job.teacher.device).release()
    curve = watch.curve
    stopped = watch.judge()
    step = stopped.kept if stopped else curve.steps[-1].step
    record = {
        "steps": curve.steps,
        "tokens_seen": curve.steps[-1].tokens if curve.steps else 0,
        "samples": job.tokens.samples,
        "processes": job.processes.size,
        "trained_parameters": curve.trained_parameters,
        "checks": curve.checks,
        **({"stopped": stopped} if stopped else {}),
    }
    return record, job.work / TRAINER.file / f"checkpoint-{step}"


def measure_pace(job: Job, limit: float) -> float:
    """Return the seconds per token of steps of many samples, in all processes.

    Args:
        limit: seconds after which only a step that has begun is finished.
    """
    trial = job.work / TRIAL.file
    job = dataclasses.replace(job, tokens=pieces(job.tokens, SHORT), work=trial)
    size = job.processes.size
    batch = 64 * size
    timed = {"steps": _TIMED, "batch": batch, "seconds": limit}
    watch = Watch(job, usual_recipe(job).model_copy(update=timed))
    with _student(job, batch) as (student, plan):
        several = max(1, plan.most // int(job.tokens.mask.sum(1).max()))
        starts = range(job.processes.rank, _TIMED * size, size)
        order = [
            [i % job.tokens.samples for i in range(k * several, (k + 1) * several)]
            for k in starts
        ]
        _run(watch, student, plan, order)
    if job.leads:
        shutil.rmtree(trial, ignore_errors=True)
    counts = np.diff([step.tokens for step in watch.curve.steps], prepend=0)
    paces: list[float] = (watch.seconds / counts).tolist()
    # Without the first step, which compiles and allocates, if there was time for others.
    return job.processes.decide(lambda: min(paces[1:] or paces))


@contextlib.contextmanager
def _student(job: Job, batch: int) -> Iterator[tuple[Any, HealingMemory]]:
    """Yield the model to train, with its loss and attention, and its memory plan.

    Without sharding, it shares the teacher's weights: only weights that are trained, patched or in
    float32 need new memory. For FSDP or DeepSpeed the model stays on the CPU in one dtype, to be
    sharded.
    """
    config = job.config
    device = job.teacher.device
    teacher = job.teacher.model
    # An earlier timing run may still be in memory until it is released.
    BatchLimit(device).release()
    sharded = is_sharded(trainer_settings(config))
    placed = False
    # FSDP shards weights of one dtype only. Else only what is trained needs float32.
    whole = sharded or config.method == "full"
    stored = torch.float32 if whole else DTYPES[stored_dtype(job.start)]
    plain = load_student(job.start, config, stored)
    student = prepare_training(plain, config)
    compute = job.teacher.dtype
    if not sharded:
        set_dtypes(plain, compute)
        placed = share(plain, teacher, job.removed)
    # Layers with weights in the compute dtype accept float32 inputs only under autocast.
    with torch.autocast(device.type, compute, enabled=compute != torch.float32):
        install(student, plain, teacher)

    make = partial(plan_memory, job, student, batch, placed=placed)

    def plan() -> dict[str, Any]:
        # Reuse the recorded plan; for a student that does not fit now, `make` raises an error.
        file = job.work / MEMORY.file
        known = placed or sharded
        return (keep_result(file, HealingMemory, make) if known else make()).content()

    with quiet_transformers():
        yield student, HealingMemory(**job.processes.decide(plan))


def _run(
    watch: Watch,
    student: Any,
    plan: HealingMemory,
    order: Order,
    last: Path | None = None,
) -> None:
    """Train, starting from the saved state ``last`` if given."""

    def sum_losses(
        outputs: Any, labels: Tensor, num_items_in_batch: Any = None
    ) -> Tensor:
        predictions = (labels != -100).sum()
        # The sum of the losses, and the number of predictions, since the last step.
        watch.sums += torch.stack(
            [outputs["loss"].detach().double(), predictions.double()]
        )
        scaled: Tensor = outputs["loss"] / (
            predictions if num_items_in_batch is None else num_items_in_batch
        )
        return scaled

    trainer = OurTrainer(
        tokens=watch.job.tokens,
        order=order,
        model=student,
        args=_arguments(watch, plan, order),
        train_dataset=range(watch.job.tokens.samples),
        compute_loss_func=sum_losses,
        callbacks=[watch],
    )
    trainer.remove_callback(PrinterCallback)
    steps = trainer.args.max_steps
    longest = int(watch.job.tokens.mask.sum(1).max())
    limit = watch.recipe.seconds
    long = steps if limit is None else f"{duration(limit)} of"
    words = f"healing, {long} steps of {watch.recipe.batch} x {longest} tokens"
    if watch.timing:
        words = f"timing, {steps} steps"
    with watch.job.progress(words, steps) as watch.bar:
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except ImportError as e:
            raise _make_error(e) from e


def _last_state(job: Job) -> Path | None:
    """Return the last complete state of this training; delete incomplete states."""
    if job.leads:
        complete = complete_states(job.work)
        for path in (job.work / TRAINER.file).glob("checkpoint-*"):
            if path not in complete:
                shutil.rmtree(path)
    job.processes.wait()
    return next(reversed(complete_states(job.work)), None)


def _arguments(watch: Watch, plan: HealingMemory, order: Order) -> TrainingArguments:
    parts = order.micro_batches if isinstance(order, Steps) else 1
    job = watch.job
    batch = watch.recipe.batch
    config = job.config
    size = job.processes.size
    steps = len(order) // parts
    device = job.teacher.device
    # Save two to ten states, each with a check, and at least one every 50 steps.
    tokens = steps * batch * (float(job.tokens.mask.sum()) / job.tokens.samples)
    states = min(10.0, max(2.0, tokens / _EACH_CHECK))
    given = trainer_settings(config)
    again = get_checkpointing() if plan.recompute else {}
    if given.get("fsdp") and not isinstance(more := given.get("fsdp_config"), str):
        # FSDP's own recomputation gathers a block's weights once for recomputation and gradients.
        own = {"version": 2, "activation_checkpointing": plan.recompute}
        given["fsdp_config"] = {**own, **(more or {})}
        again = {}
    settings: dict[str, Any] = {
        "learning_rate": watch.recipe.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": min(100, steps // 10),
        "weight_decay": 0.0,
        "save_steps": min(50, math.ceil(steps / states)),
        "bf16": job.teacher.dtype == torch.bfloat16,
        "fp16": job.teacher.dtype == torch.float16,
        **again,
        **({"ddp_find_unused_parameters": False} if size > 1 else {}),
        **given,
        "output_dir": str(job.work / TRAINER.file),
        "per_device_train_batch_size": -(-batch // (size * parts)),
        "gradient_accumulation_steps": parts,
        "max_steps": steps,
        "logging_strategy": "no",
        "save_strategy": "no" if watch.timing else "steps",
        "save_total_limit": 2,
        "seed": config.seed,
        "use_cpu": device.type == "cpu",
        "report_to": [],
        "disable_tqdm": True,
    }
    try:
        arguments = TrainingArguments(**settings)
        if arguments.n_gpu > 1:
            # DataParallel would copy the model without its loss; a launcher is needed for all GPUs.
            arguments._n_gpu = 1
        return arguments
    except (TypeError, ValueError, ImportError) as e:
        raise _make_error(e) from e


def _make_error(error: Exception) -> InputError:
    return InputError(f"transformers rejects the training arguments: {one_line(error)}")


class OurTrainer(Trainer):
    """Trainer with given micro-batches, and float32 where FSDP would round.

    Args:
        tokens: all samples.
        order: micro-batches of this process, as sample indices.
    """

    def __init__(self, tokens: TokenSet, order: Order, **rest: Any) -> None:
        super().__init__(**rest)
        self.tokens = tokens
        self.order = order
        self._keep_float32()

    def _keep_float32(self) -> None:
        """Let FSDP gather weights and sum gradients and losses in float32, under autocast.

        By default FSDP rounds the loss to the compute dtype. On CPUs accelerate ignores FSDP, so it
        is turned on here.
        """
        state: Any = self.accelerator.state
        model: Any = self.model
        given = getattr(self.args, "fsdp_plugin_args", None)
        if given and not self.is_fsdp_enabled:
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**given)
            state.distributed_type = PartialState().distributed_type = (
                DistributedType.FSDP
            )
            self.is_fsdp_enabled = True
        if self.is_fsdp_enabled and state.fsdp_plugin.fsdp_version == 2:
            state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
            state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
            half = torch.float16 if self.args.fp16 else torch.bfloat16
            enabled = self.args.fp16 or self.args.bf16
            cast = torch.autocast(self.args.device.type, half, enabled=enabled)
            model.forward = cast(model.forward)

    def get_train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return the micro-batches of this process, without distributing them to processes."""
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_sampler=self.order,
            collate_fn=partial(batch_of, self.tokens),
            pin_memory=self.args.device.type == "cuda",
        )


class Watch(TrainerCallback):
    """Callback that keeps the loss curve, shows progress, runs checks, and raises at NaN losses.

    Args:
        recipe: settings of the training, or of a timing run, in which the job has none.

    Attributes:
        opened: when the time of the recipe began.
    """

    def __init__(self, job: Job, recipe: HealingRecipe) -> None:
        self.job = job
        self.recipe = recipe
        self.timing = job.recipe is None
        self.bar: Bar
        device = job.teacher.device
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.curve = HealingCurve(
            steps=[],
            checks=[],
            trained_parameters=0,
            left=recipe.steps,
            position=0.0,
            seconds=0.0,
        )
        self.seconds: list[float] = []
        self.opened = self.began = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step:
            self.bar.advance(self.curve.position)
        else:
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
        self._refuse_no_number(loss, state.global_step)
        steps = self.curve.steps
        before = steps[-1].tokens if steps else 0
        steps.append(
            Step(step=state.global_step, tokens=before + int(predictions), loss=loss)
        )
        curve = self.curve
        curve.left = self._count_left(now)
        moved = (self.recipe.steps - curve.position) / (curve.left + 1)
        curve.position += moved
        if self.recipe.seconds is not None:
            schedule = rest["lr_scheduler"]
            # DeepSpeed's own schedules cannot be moved.
            if isinstance(schedule, LambdaLR):
                schedule.last_epoch = curve.position - 1  # type: ignore[assignment]
                schedule.step()
            if not curve.left:
                control.should_training_stop = True
                control.should_save = not self.timing
        self.bar.advance(moved, f"loss {loss:.4f}")

    def _count_left(self, now: float) -> int:
        """Return the number of steps that follow, by the slower of the last and the mean step."""
        left = self.recipe.steps - len(self.curve.steps)
        limit = self.recipe.seconds
        if limit is None:
            return left
        pace = max(fmean(self.seconds), self.seconds[-1], 1e-9)
        left = max(0, int(min(left, (self.opened + limit - now) / pace)))
        return self.job.processes.decide(lambda: left)

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        # Wait until the other processes have written their random states too.
        self.job.processes.wait()
        self.check(rest["model"], state.global_step)
        self.began = time.monotonic()
        self.curve.seconds = self.began - self.opened
        if self.job.leads:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_document(folder / CURVE, self.curve)
            mark(folder)
        if self.judge() is not None:
            control.should_training_stop = True

    def check(self, model: Any, step: int) -> None:
        """Measure the KL on the unseen text, in all processes, because the model may be sharded."""
        judge = self.job.judge
        if judge is None or self.timing:
            return
        device = self.job.teacher.device
        sums = list[float]()
        model.eval()
        with torch.no_grad():
            for i in range(judge.tokens.samples):
                batch = {
                    k: v.to(device) for k, v in batch_of(judge.tokens, [i]).items()
                }
                sums.append(float(model(**batch)["loss"]))
        model.train()
        for value in sums:
            self._refuse_no_number(value, step)
        sums = self.job.processes.decide(lambda: sums)
        self.curve.checks.append(HealingCheck(step=step, kl_sums=sums))

    def _refuse_no_number(self, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss of step {step} is {loss}; {lower_rate(self.job)}"
            )

    def judge(self) -> HealingStop | None:
        """Return the judge's verdict on the checks so far, or that there was too little time."""
        done = len(self.curve.steps)
        least = min(LEAST_STEPS, self.recipe.steps) or LEAST_STEPS
        timed = self.recipe.seconds is not None
        if timed and not self.curve.left and done < least:
            return HealingStop(
                why=f"the training changed nothing: the time, {self.job.config.train}, was over "
                f"after {done} steps, and fewer than {least} are not kept; give more time",
                kept=0,
            )
        judge = self.job.judge
        return judge.verdict(self.curve.checks) if judge else None


def lower_rate(job: Job) -> str:
    """Return the advice for NaN or infinite losses."""
    rate = "" if job.recipe is None else f", here {job.recipe.learning_rate:g}"
    return f"set a lower learning_rate with --trainer{rate}"
