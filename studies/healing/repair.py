"""Repaired models: states are cut, patched, healed and evaluated.

The stages of a state: `cut` alone; `patched` by least squares; `tuned`, with the patch tuned on the
loss, as the product does without healing; `healed`, distilled from the patched model. Checkpoints
that no other stage starts from are deleted.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from isingcut.data.healing_text import HealingText
from isingcut.evaluation.quality import sample_sums
from isingcut.evaluation.scores import score_states
from isingcut.healing.heal import heal_checkpoint
from isingcut.healing.job import Job
from isingcut.measure.work import Work
from isingcut.models import load as models
from isingcut.models.cutting.checkpoint import excise
from isingcut.options.config import HealConfig
from studies.runner import Content, Part, numbers, read
from studies.runner_models import ModelStudy, State, key, loss_row


class RepairStudy(ModelStudy):
    """Parts of the study that repair a state and evaluate it."""

    settings = (*ModelStudy.settings, "samples", "batch", "patch_tokens", "tasks")

    @classmethod
    def add_options(cls, add: Callable[..., Any]) -> None:
        super().add_options(add)
        add("--method", default="full", help="of healing: full, lora or last:N")
        add("--steps", type=numbers, default=[40], help="of trainings")
        add("--samples", type=int, help="of the training text; by default what the steps see")
        add("--batch", type=int, default=8)
        add("--rate", type=float, default=3e-4, help="highest learning rate")
        add("--patch-tokens", type=int, default=32768)
        add("--tasks", nargs="*", default=[])

    @cached_property
    def text(self) -> HealingText:
        """Text for fitting patches and for healing, with held-out samples."""
        o = self.options
        samples = o.samples or max(max(o.steps) * o.batch, -(-o.patch_tokens // o.length))
        return self.texts.training(samples, max(4, o.judged_tokens // o.length), o.seed)

    def _config(self, stage: str, steps: int) -> HealConfig:
        o = self.options
        config = HealConfig(
            length=o.length,
            seed=o.seed,
            dtype=o.dtype,
            patch_tokens=o.patch_tokens,
            batch_tokens=o.batch_tokens,
        )
        if stage in ("patched", "tuned"):
            patch = "tuned" if stage == "tuned" else "linear"
            return config.replace(patch=patch, method="none")
        settings = {"max_steps": steps, "per_device_train_batch_size": o.batch}
        settings |= {"learning_rate": o.rate, "save_steps": 25}
        return config.replace(patch="none", method=o.method, trainer=settings)

    def repair(self, removed: State, stage: str, steps: int = 0, name: str = "") -> Part:
        """Return the part that brings a state to a stage, from the one before, and evaluates it.

        Args:
            steps: training steps.
            name: folder of the part; by default the stage.
        """
        o = self.options

        def make(journal: Path) -> Content:
            folder = self.work / "models" / key(removed)
            cut, out = folder / "cut", folder / (name or stage)
            if not cut.exists():
                excise(self.original.folder, list(removed), cut)
            start = cut if stage in ("patched", "tuned") else folder / "patched"
            # An existing checkpoint is complete: its evaluation was killed.
            if not out.exists():
                # Four samples are enough for the record; the evaluation texts measure the gain.
                text = dataclasses.replace(self.text, report=self.text.report.select(range(4)))
                config = self._config(stage, steps)
                job = Job(self.original, tuple(removed), start, text.train, out, config)
                heal_checkpoint(job, text, out)
            record = read(out / "healing.json")
            found = {
                "tokens_seen": record.get("tokens_seen"),
                "stopped": record.get("stopped"),
                "training": [step["loss"] for step in record["steps"]],
                **self._judged(models.load(out, dtype=self.original.dtype_name), journal),
            }
            if stage != "patched":
                shutil.rmtree(out)
            return found

        seen = (4.5 if o.method == "full" else 3) * steps * o.batch * o.length
        if stage in ("patched", "tuned"):
            seen = o.patch_tokens * (6 if stage == "tuned" else 2.2)
        asked = sum(map(self.question_tokens, o.tasks))
        judged = 2 * o.judged_tokens * len(self.judged)
        return Part(f"{name or stage}/{key(removed)}", make, seen + asked + judged)

    def _judged(self, loaded: models.LoadedModel, journal: Path) -> Content:
        """Return the losses and answers of a model."""
        both = (self.original.model, loaded.model)
        losses = {}
        accuracy = {}
        for name in self.judged:
            tokens = self.judged_text(name)
            _, nll, kl = sample_sums(*both, tokens, Work(self.options.batch_tokens))
            losses[name] = loss_row(kl, nll, tokens)
        for task in self.options.tasks:
            work = self.working(journal.with_name(f"{journal.name}-{task}"))
            (scores,) = score_states(loaded, self.prepared(task), [()], work)
            accuracy[task] = self.answer_row(scores)
        return {"losses": losses, "accuracy": accuracy}
