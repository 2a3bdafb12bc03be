"""Base class of studies of repaired models: states are cut, patched, healed and evaluated.

The stages of a state: `cut` alone; `patched` by least squares; `tuned`, with the patch tuned on the
loss, as the product does without healing; `healed`, distilled from the patched model. Checkpoints
that no other stage starts from are deleted.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from isingcut.data.healing_text import HealingText
from isingcut.data.tokens import TokenSet
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

RECIPE = ("method", "rate", "steps")
"""Names of the options that describe a training."""


class RepairStudy(ModelStudy):
    """Base class of a study of repaired models."""

    settings = (*ModelStudy.settings, "samples", "batch", "patch_tokens", "tasks", *RECIPE)

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

    def text_of(self, stage: str) -> HealingText:
        """Return the text that a stage is fitted or trained on."""
        return self.text

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

    def repair(self, removed: State, stage: str, steps: int | None = None, name: str = "") -> Part:
        """Return the part that brings a state to a stage, from the one before, and evaluates it.

        Args:
            steps: training steps; by default the largest of `--steps`.
            name: folder of the part; by default the stage.
        """
        o = self.options
        steps = max(o.steps) if steps is None else steps

        def make(journal: Path) -> Content:
            folder = self.work / "models" / key(removed)
            cut, out = folder / "cut", folder / (name or stage)
            if not cut.exists():
                excise(self.original.folder, list(removed), cut)
            start = cut if stage in ("patched", "tuned") else folder / "patched"
            # An existing checkpoint is complete: its evaluation was killed.
            if not out.exists():
                # Four samples are enough for the record; the evaluation texts measure the gain.
                text = self.text_of(stage)
                text = dataclasses.replace(text, report=text.report.select(range(4)))
                config = self._config(stage, steps)
                job = Job(self.original, tuple(removed), start, text.train, out, config)
                heal_checkpoint(job, text, out)
            record = read(out / "healing.json")
            found = {
                "tokens_seen": record.get("tokens_seen"),
                "stopped": record.get("stopped"),
                "training": [step["loss"] for step in record["steps"]],
                **self._judged(models.load(out, dtype=self.original.dtype_name), stage, journal),
            }
            if stage != "patched":
                shutil.rmtree(out)
            return found

        seen = (4.5 if o.method == "full" else 3) * steps * o.batch * o.length
        if stage in ("patched", "tuned"):
            seen = o.patch_tokens * (6 if stage == "tuned" else 2.2)
        asked = self.question_tokens(self.repaired_tasks(stage))
        judged = 2 * o.judged_tokens * len(self.judged)
        return Part(f"{name or stage}/{key(removed)}", make, seen + asked + judged)

    def repaired_texts(self, stage: str) -> dict[str, TokenSet]:
        """Return the texts that a stage is evaluated on."""
        return {name: self.judged_text(name) for name in self.judged}

    def repaired_tasks(self, stage: str) -> Sequence[str]:
        """Return the tasks that a stage is evaluated on."""
        return self.options.tasks

    def _judged(self, loaded: models.LoadedModel, stage: str, journal: Path) -> Content:
        """Return the losses and answers of a model."""
        both, losses, accuracy = (self.original.model, loaded.model), {}, {}
        for name, tokens in self.repaired_texts(stage).items():
            _, nll, kl = sample_sums(*both, tokens, Work(self.options.batch_tokens))
            losses[name] = loss_row(kl, nll, tokens)
        for task in self.repaired_tasks(stage):
            work = self.working(journal.with_name(f"{journal.name}-{task}"))
            (scores,) = score_states(loaded, self.prepared(task), [()], work)
            accuracy[task] = self.answer_row(scores)
        return {"losses": losses, "accuracy": accuracy}
