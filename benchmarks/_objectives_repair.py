"""States of the study of objectives repaired, patched and then healed; asked both times."""

from __future__ import annotations

import shutil
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from _healing_texts import Remembered, mixed_text
from _objectives_summary import STAGES
from _parts_command import bits
from isingcut.data.healing_text import HealingText
from isingcut.evaluation.quality import sample_sums
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import Asked, score
from isingcut.healing.heal import heal_checkpoint
from isingcut.measure.work import Work
from isingcut.models import load as models
from isingcut.models.cutting.checkpoint import excise
from isingcut.options.healing import HealConfig

if TYPE_CHECKING:
    from objectives import Study

LENGTH, BATCH = 256, 8
UNSEEN = ("web", "stories", "instruct", "answers", "maths", "qa")
"""Texts of the study that no repair is fitted or trained on."""


class Repairs:
    """Repairs one state after the other.

    Args:
        study: the model, its texts and its questions.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self.teacher = Remembered(study.loaded.model)

    @cached_property
    def text(self) -> HealingText:
        o = self.study.options
        return mixed_text(
            self.study.data,
            self.study.loaded.tokenizer,
            self.study.work / "healing-text",
            samples=max(o.steps * BATCH, -(-o.patch_tokens // LENGTH)),
            report_samples=4,
            length=LENGTH,
            seed=0,
        )

    def make(self, state: list[int]) -> dict[str, Any]:
        """Losses and answers of a state, patched and healed; its checkpoints are deleted."""
        folder = self.study.work / "models" / "-".join(map(str, state))
        if not (folder / "cut").exists():
            excise(self.study.loaded.folder, state, folder / "cut")
        found: dict[str, Any] = {"state": state}
        start = folder / "cut"
        for stage in STAGES:
            out = folder / stage
            if not out.exists():
                heal_checkpoint(
                    self._options(stage), self.study.loaded, state, start, self.text, out
                )
            loaded = models.load(out, dtype=str(self.study.loaded.dtype).removeprefix("torch."))
            found[stage] = {"losses": self._losses(loaded), **self._answers(loaded)}
            start = out
        shutil.rmtree(folder)
        return found

    def _options(self, stage: str) -> HealConfig:
        """Of the fitted patch alone, or of healing what has it."""
        o = self.study.options
        shared = HealConfig(length=LENGTH, dtype=o.dtype, patch_tokens=o.patch_tokens, batch=BATCH)
        if stage == "patched":
            return shared.replace(patch="linear", method="none")
        return shared.replace(
            patch="none", method=o.method, steps=o.steps, micro_batch=4, learning_rate=o.rate
        )

    def _losses(self, loaded: models.LoadedModel) -> dict[str, dict[str, float]]:
        found = {}
        for text in UNSEEN:
            tokens = self.study.texts[text]()
            _, nll, kl = sample_sums(self.teacher, loaded.model, tokens, 1024)
            count = int(tokens.predicted.sum())
            found[text] = {
                "kl": round(float(np.sum(kl)) / count, 5),
                "nll": round(float(np.sum(nll)) / count, 5),
            }
        return found

    def _answers(self, loaded: models.LoadedModel) -> dict[str, dict[str, str]]:
        right = {}
        for task in self.study.options.tasks:
            prepared = prepare_task(task, self.study.data, self.study.options.questions)
            found = score(Asked.whole(loaded), prepared, Work(1024))
            right[task] = bits(found.values)
        return {"right": right}
