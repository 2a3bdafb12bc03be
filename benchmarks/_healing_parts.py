"""Parts of the healing benchmark: choose, cut, patch, distil, judge, score; one JSON file each."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _healing_texts import Remembered, judged_texts, training_text
from isingcut.baselines import registry as baselines
from isingcut.console.progress import silent, terminal
from isingcut.data.calibration import build
from isingcut.data.healing_text import HealingText
from isingcut.data.tokens import TokenSet
from isingcut.energies.search import Search, Target
from isingcut.evaluation.quality import quality_of, sample_sums
from isingcut.evaluation.scores import prepare_task, score
from isingcut.files import documents
from isingcut.files.writing import read_json, write_json
from isingcut.healing.heal import heal_checkpoint
from isingcut.measure.work import Work
from isingcut.models import load as models
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.cutting.checkpoint import excise
from isingcut.models.replay import Replay, reuse_freed_memory
from isingcut.models.sources import resolve
from isingcut.options.healing import HealConfig

KIND = "healing-part"
# The benchmark's own files, which no run has: their keys are checked where they are used.
documents.KINDS.update({KIND: documents.Strict, "healing-settings": documents.Strict})
OURS = "isingcut"
PEERS = ("block-influence", "angular-window", "sleb")
STAGES = ("cut", "patched", "healed")
TASKS = ("arc_easy", "hellaswag", "piqa", "winogrande", "lambada", "mmlu_0shot")
TASK_TOKENS = {
    "arc_easy": 114,
    "hellaswag": 312,
    "piqa": 71,
    "winogrande": 45,
    "lambada": 82,
    "mmlu_0shot": 129,
}
"""Tokens a question of the 500 costs, all choices together; for the estimate only."""


@dataclass(frozen=True)
class Part:
    """One file of the work folder.

    Attributes:
        name: its path without the suffix.
        make: computes the content.
        tokens: its cost, in tokens passed forward through the whole original model.
    """

    name: str
    make: Callable[[], dict[str, Any]]
    tokens: float


def key(removed: list[int]) -> str:
    """A state as part of a file name."""
    return "-".join(map(str, removed))


class Bench:
    """The model, the texts and the parts.

    Args:
        options: the command line's.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work, self.data = Path(options.work), Path(options.data)
        settings = {
            k: getattr(options, k)
            for k in ("model", "length", "steps", "batch", "rate", "patch_tokens")
        } | {k: getattr(options, k) for k in ("judged_tokens", "questions", "dtype", "seed")}
        path = self.work / "settings.json"
        if not path.exists():
            write_json(path, "healing-settings", settings)
        elif {k: read_json(path, "healing-settings")[k] for k in settings} != settings:
            raise SystemExit(f"{path} holds other settings; choose another --work")
        self.progress = silent if options.quiet else terminal

    def path(self, name: str) -> Path:
        """The file of a part."""
        return self.work / "parts" / f"{name}.json"

    def done(self, name: str) -> bool:
        """Whether a part is finished."""
        return self.path(name).exists()

    def read(self, name: str) -> dict[str, Any]:
        """The content of a finished part."""
        return read_json(self.path(name), KIND)

    def run(self, part: Part) -> float:
        """Make a part; seconds taken."""
        began = time.perf_counter()
        content = part.make()
        seconds = time.perf_counter() - began
        write_json(self.path(part.name), KIND, {"seconds": round(seconds, 1), **content})
        return seconds

    # the model and the texts --------------------------------------------------------------

    @cached_property
    def original(self) -> models.LoadedModel:
        return models.load(resolve(self.options.model), dtype=self.options.dtype)

    @cached_property
    def remembered(self) -> Any:
        return Remembered(self.original.model)

    @cached_property
    def speed(self) -> float:
        """Seconds a token takes through the original, fastest of three batches."""
        reuse_freed_memory()
        ids = torch.randint(8, 200, (4, self.options.length))
        taken = []
        with torch.inference_mode():
            for _ in range(3):
                began = time.perf_counter()
                self.original.model(ids, use_cache=False)
                taken.append(time.perf_counter() - began)
        return min(taken) / ids.numel()

    @cached_property
    def text(self) -> HealingText:
        o = self.options
        patch = -(-o.patch_tokens // o.length)
        return training_text(
            self.data,
            self.original.tokenizer,
            self.work / "text" / "train.jsonl",
            samples=max(o.steps * o.batch, patch),
            length=o.length,
            seed=o.seed,
        )

    @cached_property
    def judged(self) -> dict[str, TokenSet]:
        return judged_texts(self.data, self.original.tokenizer, self.options.judged_tokens)

    def load(self, folder: Path) -> models.LoadedModel:
        """A checkpoint of the benchmark, computed as the original is."""
        return models.load(folder, dtype=str(self.original.dtype).removeprefix("torch."))

    # the parts ----------------------------------------------------------------------------

    def states(self) -> Part:
        """What each method removes, for every M; the budget of ours is SLEB's price."""
        pool = 8 * 256

        def make() -> dict[str, Any]:
            o = self.options
            if o.states:
                given = json.loads(Path(o.states).read_text(encoding="utf-8"))
                return {"from": Path(o.states).name, "states": given}
            model = self.original.model
            replay = Replay(model, stack_modules(model, find_stack(model)))
            tokens = build(
                "wiki",
                self.original.tokenizer,
                samples=8,
                rank_samples=1,
                report_samples=1,
                length=256,
                seed=o.seed,
            ).splits["energy"]
            journal = self.work / "states.journal"
            work = Work(o.batch_tokens, self.progress, journal)
            found: dict[str, dict[str, list[int]]] = {}
            for m in o.remove:
                rows = {}
                for name in PEERS:
                    outcome = baselines.get(name)().choose(replay, tokens, m, work, o.seed)
                    rows[name] = list(outcome.removed)
                target = Target.count(len(replay), m)
                searched = Search(replay, tokens, work, [target], seed=o.seed).run()
                found[str(m)] = {OURS: list(searched.best(m)), **rows}
            return {"from": f"searched on {pool} tokens of wiki", "states": found}

        return Part("states", make, 0 if self.options.states else 400 * pool)

    def chosen(self, m: int) -> dict[str, list[int]]:
        """Each method's blocks."""
        rows = self.read("states")["states"][str(m)]
        return {method: sorted(map(int, rows[method])) for method in (OURS, *PEERS)}

    def folder(self, removed: list[int], stage: str) -> Path:
        """Where the checkpoint of a state at a stage is."""
        if not removed:
            return self.original.folder
        return self.work / "models" / key(removed) / stage

    def _healing(self, **changes: Any) -> HealConfig:
        o = self.options
        return HealConfig(
            length=o.length,
            steps=o.steps,
            batch=o.batch,
            micro_batch=o.micro_batch,
            learning_rate=o.rate,
            warmup_steps=max(1, o.steps // 10),
            seed=o.seed,
            dtype=o.dtype,
            patch_tokens=o.patch_tokens,
            save_steps=10,
            batch_tokens=o.batch_tokens,
        ).replace(**changes)

    def _heal(self, removed: list[int], start: str, stage: str, **changes: Any) -> Any:
        out = self.folder(removed, stage)
        if out.exists():
            shutil.rmtree(out)
        found = heal_checkpoint(
            self._healing(**changes),
            self.original,
            removed,
            self.folder(removed, start),
            self.text,
            out,
            self.progress,
        )
        return {k: v for k, v in found.items() if k not in ("format", "version", "seconds")}

    def patch(self, removed: list[int]) -> Part:
        """Cut a state and patch it."""

        def make() -> dict[str, Any]:
            excise(self.original.folder, removed, self.folder(removed, "cut"), overwrite=True)
            return self._heal(removed, "cut", "patched", patch="linear", method="none")

        # Two passes, a fifth more for the moments; scores before and after.
        return Part(f"patch/{key(removed)}", make, 2.2 * self.options.patch_tokens + 3000)

    def distil(self, removed: list[int]) -> Part:
        """Distil the original into the patched state."""
        o = self.options
        # The student's three passes and the teacher's one, the optimiser's steps.
        tokens = o.steps * o.batch * o.length

        def make() -> dict[str, Any]:
            return self._heal(removed, "patched", "healed", patch="none", method="full")

        return Part(f"distil/{key(removed)}", make, 4.5 * tokens + 3000)

    def judge(self, removed: list[int], stage: str) -> Part:
        """Loss and KL on each judged text."""

        def make() -> dict[str, Any]:
            cut = self.load(self.folder(removed, stage)).model
            texts = {}
            for name, tokens in self.judged.items():
                sums = sample_sums(self.remembered, cut, tokens, self.options.batch_tokens)
                found = quality_of(sums, tokens)
                texts[name] = {
                    "tokens": tokens.tokens,
                    "nll": found["after"]["nll"],
                    "nll_se": found["after"]["nll_se"],
                    "original_nll": found["before"]["nll"],
                    "kl": found["kl"],
                    "kl_se": found["kl_se"],
                    "sample_nll": sums[1].round(4).tolist(),
                    "sample_tokens": tokens.predicted.sum(1).tolist(),
                }
            return {"texts": texts}

        return Part(f"judge/{key(removed)}/{stage}", make, 3.5 * self.options.judged_tokens)

    def accuracy(self, removed: list[int], stage: str, task: str) -> Part:
        """Scores by question."""
        o = self.options
        share = 1 - len(removed) / len(find_stack(self.original.model))
        where = f"{key(removed)}/{stage}" if removed else "original"

        def make() -> dict[str, Any]:
            loaded = self.load(self.folder(removed, stage)) if removed else self.original
            found = score(loaded, prepare_task(task, self.data, o.questions), batch=o.score_batch)
            return {
                "task": task,
                "metric": found.metric,
                "questions": found.questions,
                "values": np.asarray(found.values).astype(int).tolist(),
            }

        cost = TASK_TOKENS[task] * o.questions * max(share, 0.3)
        return Part(f"accuracy/{where}/{task}", make, cost)

    # what is left -------------------------------------------------------------------------

    def best_peer(self, m: int) -> str | None:
        """The peer whose healed state has the lowest loss, once all were judged."""
        rows = self.chosen(m)
        found = {p: self.pooled(rows[p], "healed") for p in PEERS}
        if any(v is None for v in found.values()):
            return None
        return min(found, key=lambda p: found[p]["nll"])  # type: ignore[index]

    def pooled(self, removed: list[int], stage: str) -> dict[str, float] | None:
        """Figures over all tokens of the judged texts."""
        name = f"judge/{key(removed)}/{stage}"
        if not self.done(name):
            return None
        texts = self.read(name)["texts"].values()
        weights = np.array([t["tokens"] for t in texts], dtype=float)
        weights /= weights.sum()
        found: dict[str, float] = {}
        for k in ("nll", "original_nll", "kl"):
            found[k] = float(weights @ np.array([t[k] for t in texts]))
        for k in ("nll_se", "kl_se"):
            found[k] = float(np.sqrt((weights**2) @ np.array([t[k] for t in texts]) ** 2))
        return found

    def parts(self) -> list[Part]:
        """Everything that can be named now, the most important first."""
        first = self.states()
        if not self.done("states"):
            return [first]
        found = [first]
        for m in self.options.remove:
            distinct = {key(r): r for r in self.chosen(m).values()}
            for removed in distinct.values():
                found += [self.patch(removed), self.distil(removed)]
                found += [self.judge(removed, stage) for stage in STAGES]
        if self.options.no_accuracy:
            return found
        tasks = self.options.tasks
        # Healed models first: the others are quickly made again from what is kept.
        for stage in ("healed", "cut", "patched"):
            for m in self.options.remove:
                rows = self.chosen(m)
                peers = PEERS if self.options.all_peers else [self.best_peer(m)]
                scored = [rows[OURS]]
                scored += [rows[peer] for peer in peers if peer is not None]
                found += [self.accuracy(removed, stage, t) for removed in scored for t in tasks]
            if stage == "healed":
                found += [self.accuracy([], "original", t) for t in tasks]
        unique = {part.name: part for part in found}
        return list(unique.values())
