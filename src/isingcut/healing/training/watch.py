"""What goes on around the steps of a training: batches, states, the loss curve, the clock."""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from isingcut.console.progress import Bar
from isingcut.errors import ModelError
from isingcut.files.outputs import mark
from isingcut.files.writing import clear_os_errors, write_json
from isingcut.healing.job import Job
from isingcut.healing.judging import Verdict
from isingcut.healing.training.batches import Rows, Steps, TimedSteps, collate
from isingcut.healing.work_folder import CURVE


def at_the_end(losses: Sequence[float], steps: int) -> float | None:
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
        timing: nothing is trained to be kept.
    """

    def __init__(self, job: Job, words: str, *, timing: bool = False) -> None:
        self.job, self.words, self.timing = job, words, timing
        device = job.teacher.device
        self.bar: Bar | None = None
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)
        self.curve: list[dict[str, Any]] = []
        self.seconds: list[float] = []
        self.began = time.monotonic()
        self.checks: list[dict[str, Any]] = []
        self.verdict: Verdict | None = None
        self.shown: Any = contextlib.ExitStack()

    def count(self, loss: Tensor, predictions: Tensor) -> None:
        """Add a micro-batch's summed loss and its predictions."""
        self.sums += torch.stack([loss.detach().double(), predictions.double()])

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.began = time.monotonic()
        if self.job.leads:
            size = self.job.config.sequences
            longest = int(self.job.tokens.mask.sum(1).max())
            words = f"{self.words}, {state.max_steps} steps"
            if not self.timing:
                words += f" of {size} x {longest} tokens"
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
            end = at_the_end([c["loss"] for c in self.curve], state.max_steps)
            about = "" if end is None else f", at the end about {end:.2f}"
            self.bar.advance(1, f"loss {loss:.4f}{about}")

    def on_save(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        # The other processes have written their random states, too.
        self.job.processes.wait()
        self.check(rest["model"], state.global_step)
        if self.job.leads:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            kept = {"steps": self.curve, "checks": self.checks, "training": self.job.identity}
            write_json(folder / CURVE, "healing-curve", kept)
            mark(folder)
        if self.judged() is not None:
            control.should_training_stop = True

    def check(self, model: Any, step: int) -> None:
        """Measure the text held out, in every process alike, as a model may be shared by all."""
        judge = self.job.judge
        # Kept answers are those to the text that is trained on; none of the teacher's are at hand.
        if judge is None or self.job.config.top_k or self.timing:
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
            raise ModelError(
                f"the loss of step {step} is {loss}; lower --learning-rate, here "
                f"{self.job.config.rate:g}"
            )

    def judged(self) -> Verdict | None:
        """What the checks so far say, kept as `verdict`."""
        if self.checks and self.job.judge is not None:
            self.verdict = self.job.judge.verdict(self.checks)
        return self.verdict

    def on_train_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.shown.close()
