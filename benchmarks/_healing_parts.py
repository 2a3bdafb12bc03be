"""Parts of the healing benchmark: choose, cut, patch, distil, judge, score; one JSON file each."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from _healing_states import search_states
from _healing_work import Part, WorkFolder, key
from _parts_command import TASK_TOKENS
from isingcut.data.tokens import TokenSet
from isingcut.evaluation.quality import quality_of, sample_sums
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import Asked, score
from isingcut.healing.heal import heal_checkpoint
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack
from isingcut.models.cutting.checkpoint import excise
from isingcut.options.healing import HealConfig
from isingcut.options.types import TEXT

OURS = "isingcut"
PEERS = ("block-influence", "angular-window", "sleb")
TRIED = (OURS, "block-influence", "angular-window")
"""States that are healed for a few steps, the best of them for long: ours, and one-pass ones."""
STAGES = ("cut", "patched", "tuned", "healed")
TASKS = ("arc_easy", "hellaswag", "piqa", "winogrande", "lambada", "mmlu_0shot")


class Bench(WorkFolder):
    """What can be made, and in which order."""

    def states(self) -> Part:
        """What each method removes, for every M."""

        def make() -> dict[str, Any]:
            o = self.options
            if o.states:
                given = json.loads(Path(o.states).read_text(encoding="utf-8"))
                return {"from": Path(o.states).name, "states": given}
            work = Work(o.batch_tokens, self.progress, self.work / "states.journal")
            found = search_states(self.original, o.remove, PEERS, o.state_tokens, work, o.seed)
            where = f"searched on {o.state_tokens} tokens of {TEXT}"
            return {
                "from": where,
                "states": {m: {OURS: rows.pop("searched"), **rows} for m, rows in found.items()},
            }

        return Part("states", make, 0 if self.options.states else 400 * self.options.state_tokens)

    def chosen(self, m: int) -> dict[str, list[int]]:
        """Each method's blocks."""
        rows = self.read("states")["states"][str(m)]
        return {method: sorted(map(int, rows[method])) for method in (OURS, *PEERS)}

    def _healing(self, **changes: Any) -> HealConfig:
        o = self.options
        return HealConfig(
            length=o.length,
            steps=o.steps,
            batch=o.batch,
            micro_batch=o.micro_batch,
            learning_rate=o.rate,
            method=o.method,
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
        cut = self.folder(removed, "cut")
        if start == "cut" and not cut.exists():
            excise(self.original.folder, removed, cut)
        # Four samples are enough for the record; the judged texts say what it won.
        text = dataclasses.replace(self.text, report=self.text.report.select(range(4)))
        found = heal_checkpoint(
            self._healing(**changes),
            self.original,
            removed,
            self.folder(removed, start),
            text,
            out,
            self.progress,
        )
        return {k: v for k, v in found.items() if k not in ("format", "version", "seconds")}

    def patch(self, removed: list[int], kind: str = "linear") -> Part:
        """Cut a state and patch it, by least squares alone or tuned."""
        stage = "tuned" if kind == "tuned" else "patched"

        def make() -> dict[str, Any]:
            return self._heal(removed, "cut", stage, patch=kind, method="none")

        # Two passes, a fifth more for the moments; scores before and after. Tuning: two readings
        # forward and back.
        passes = 9 if kind == "tuned" else 2.2
        return Part(f"{stage}/{key(removed)}", make, passes * self.options.patch_tokens + 6000)

    def _cost(self, steps: int) -> float:
        """Of a distillation: the teacher's pass and the student's three, the optimiser's steps."""
        o = self.options
        return 6000 + (4.5 if o.method == "full" else 3) * steps * o.batch * o.length

    def distil(self, removed: list[int]) -> Part:
        """Distil the original into the patched state."""

        def make() -> dict[str, Any]:
            return self._heal(removed, "patched", "healed", patch="none")

        return Part(f"distil/{key(removed)}", make, self._cost(self.options.steps))

    def attempt(self, removed: list[int]) -> Part:
        """Distil for a few steps and judge on the text held out, as `--heal-top` does."""
        o = self.options

        def make() -> dict[str, Any]:
            self._heal(removed, "patched", "tried", patch="none", steps=o.top_steps)
            found = self._judged(removed, "tried", {"held out": self.text.report})
            shutil.rmtree(self.folder(removed, "tried"))
            return found["held out"]

        return Part(f"try/{key(removed)}", make, self._cost(o.top_steps) + 2 * o.top_tokens)

    def judge(self, removed: list[int], stage: str) -> Part:
        """Loss and KL on each judged text."""

        def make() -> dict[str, Any]:
            found = {"texts": self._judged(removed, stage, self.judged)}
            if self.options.no_accuracy and stage != "patched":
                # Nothing starts from it again.
                shutil.rmtree(self.folder(removed, stage))
            return found

        return Part(f"judge/{key(removed)}/{stage}", make, 4 * self.options.judged_tokens)

    def _judged(
        self, removed: list[int], stage: str, texts: dict[str, TokenSet]
    ) -> dict[str, dict[str, Any]]:
        cut = self.load(self.folder(removed, stage)).model
        rows = {}
        for name, tokens in texts.items():
            sums = sample_sums(self.remembered, cut, tokens, self.options.batch_tokens)
            found = quality_of(sums, tokens)
            rows[name] = {
                "tokens": tokens.tokens,
                "nll": found["after"]["nll"],
                "nll_se": found["after"]["nll_se"],
                "original_nll": found["before"]["nll"],
                "kl": found["kl"],
                "kl_se": found["kl_se"],
                "sample_nll": sums[1].round(4).tolist(),
                "sample_kl": sums[2].round(4).tolist(),
                "sample_tokens": tokens.predicted.sum(1).tolist(),
            }
        return rows

    def accuracy(self, removed: list[int], stage: str, task: str) -> Part:
        """Scores by question."""
        o = self.options
        share = 1 - len(removed) / len(find_stack(self.original.model))
        where = f"{key(removed)}/{stage}" if removed else "original"

        def make() -> dict[str, Any]:
            loaded = self.load(self.folder(removed, stage)) if removed else self.original
            asked = prepare_task(task, self.data, o.questions)
            found = score(Asked.whole(loaded), asked, Work(o.batch_tokens))
            return {
                "task": task,
                "metric": found.metric,
                "questions": found.questions,
                "values": np.asarray(found.values).astype(int).tolist(),
            }

        cost = TASK_TOKENS[task] * o.questions * max(share, 0.3)
        return Part(f"accuracy/{where}/{task}", make, cost)

    # what is left -------------------------------------------------------------------------

    def tried(self, m: int) -> dict[str, list[int]]:
        """The states that are candidates for the healed one, by the method they are of."""
        rows = self.chosen(m)
        return {method: rows[method] for method in TRIED[: None if self.options.top_steps else 1]}

    def after_trial(self, m: int) -> str | None:
        """Whose state is healed for us: the candidate of the lowest KL, once all were tried."""
        found = self.tried(m)
        if len(found) == 1:
            return OURS
        if not all(self.done(f"try/{key(removed)}") for removed in found.values()):
            return None
        return min(found, key=lambda method: self.read(f"try/{key(found[method])}")["kl"])

    def best_peer(self, m: int) -> str | None:
        """The peer of the lowest healed (if only one is healed: patched) loss, once all have it."""
        rows = self.chosen(m)
        stage = "healed" if self.options.peers == "all" else "patched"
        found = {p: self.pooled(rows[p], stage) for p in PEERS}
        if any(v is None for v in found.values()):
            return None
        return min(found, key=lambda p: found[p]["nll"])  # type: ignore[index]

    def healed(self, m: int) -> list[list[int]]:
        """States that are distilled, ours first, as far as they are known."""
        rows = self.chosen(m)
        if self.options.peers == "all":
            return list(rows.values())
        methods = (self.after_trial(m), self.best_peer(m))
        return [rows[method] for method in methods if method is not None]

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
            rows = self.chosen(m)
            for removed in rows.values():
                found += [self.patch(removed), self.judge(removed, "patched")]
            found += [self.patch(rows[OURS], "tuned"), self.judge(rows[OURS], "tuned")]
            found += [self.judge(removed, "cut") for removed in rows.values()]
            if self.options.top_steps:
                found += [self.attempt(removed) for removed in self.tried(m).values()]
            for removed in self.healed(m):
                found += [self.distil(removed), self.judge(removed, "healed")]
        found = list({part.name: part for part in found}.values())
        if self.options.no_accuracy:
            return found
        tasks = self.options.tasks
        # Healed models first: the others are quickly made again from what is kept.
        for stage in ("healed", "cut", "patched"):
            for m in self.options.remove:
                rows = self.chosen(m)
                peers = PEERS if self.options.all_peers else [self.best_peer(m)]
                chosen = self.after_trial(m) if stage == "healed" else OURS
                scored = [rows[chosen]] if chosen is not None else []
                scored += [rows[peer] for peer in peers if peer is not None]
                found += [self.accuracy(removed, stage, t) for removed in scored for t in tasks]
            if stage == "healed":
                found += [self.accuracy([], "original", t) for t in tasks]
        unique = {part.name: part for part in found}
        return list(unique.values())
