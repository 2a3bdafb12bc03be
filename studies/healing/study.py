"""Recovery by healing: the patch alone, and with distillation, for our state and the peers'.

The states are chosen on `--state-tokens` tokens, ours by the default search; `--states FILE`
gives some of them ({"9": {"isingcut": [...], "block-influence": [...], ...}}). Method `last` keeps
the first blocks of the original. Each state is cut, patched by least squares and distilled with the
same text and seed: Wikipedia leads, conversations and Python code. `--steps` may give several
lengths: separate trainings, all on the first of the `--samples` in the same order. `--method` and
`--rate` may change between calls with one work folder.

The stages of a state: `cut` alone; `patched` by least squares; `tuned`, with the patch tuned on the
loss; `healed`, distilled from the patched model. Checkpoints that no other stage starts from are
deleted. States of the methods in `--tuned` also get the tuned patch, which is the product's default
without distillation. Every stage is evaluated on text that nothing was chosen, fitted or trained
on. `--model coder` is the second model. (In `healing.json` the state to heal was chosen by a trial
of 20 steps, code of 70bd966; it was the method's own each time.)

Figures, for M removed blocks, pooled over all tokens of the evaluation texts, with the `--prefix`
of the results file in front; each `over` has a paired standard error, `_se`:

recovered_percent_M_at_TOKENS  share of the log-perplexity lost by our cut that patch and
  distillation on so many predictions recover
patch_percent_M  the same for the tuned patch alone
healed_ppl_over_best_peer_M_TOKENS  healed perplexity over that of the best peer healed as long;
  below 1 is a win
kl_over_best_peer_M, cut_ppl_over_best_peer_M  the ratios of KL and perplexity before any repair

With `--tasks` every stage is also asked the questions of lm-evaluation-harness. The means are over
the tasks without generation, paired by question, with 95 % intervals: each stage's minus that of
the first stage with answers, and isingcut's minus another method's at the same stage.

`patches.json` is from commit 70bd966, when patches were fitted and tuned on conversations and
Wikipedia leads alone. `patch.json` has the patch tuned on 65,536 tokens, read once in steps of 512;
that of `healing.json` read 32,768 twice, in steps of 2,048. `answers.json` and
`answers_coder.json` are of the study `accuracy` before it became part of this one, the second from
commit 70bd966; its stages `last3` (the last blocks removed, and the last three remaining ones
trained), `length` and `channel` (the stream rescaled after each cut) have no code any more.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.data.healing_text import HealingText
from isingcut.evaluation.quality import sample_sums
from isingcut.evaluation.scores import score_states
from isingcut.formats.cutting.checkpoint import excise
from isingcut.healing.heal import heal_checkpoint
from isingcut.healing.job import Job
from isingcut.measure.losses import standard_error
from isingcut.measure.work import Work
from isingcut.models import load as models
from isingcut.options.heal import HealConfig
from isingcut.options.text import TEXT
from studies.healing.summary import OURS, PEERS, STAGES, show
from studies.runner import Content, Part, numbers, read
from studies.runner_choices import TOP, Setting, choose, cost
from studies.runner_models import ModelStudy, State, key, loss_row, mean_loss

USUAL_RATE = 3e-4
PATCHES = ("patched", "tuned")


class Healing(ModelStudy):
    """Study of our repaired state and the peers' repaired states."""

    name = "healing"
    judged = ("wikitext2", "c4", "instruct", "code")
    settings = (
        *ModelStudy.settings,
        *("samples", "batch", "patch_tokens", "tasks", "state_tokens"),
    )

    @classmethod
    def add_options(cls, add: Callable[..., Any]) -> None:
        super().add_options(add)
        add("--method", default="full", help="of healing: full or lora")
        add("--steps", type=numbers, default=[40], help="of trainings")
        add(
            "--samples",
            type=int,
            help="of the training text; by default what the steps see",
        )
        add("--batch", type=int, default=8)
        add("--rate", type=float, default=3e-4, help="highest learning rate")
        add("--patch-tokens", type=int, default=32768)
        add("--tasks", nargs="*", default=[])
        add("--remove", type=numbers, default=[9, 6, 12])
        add(
            "--methods",
            nargs="*",
            default=[OURS, *PEERS],
            help="those of `runner_choices`",
        )
        add(
            "--states",
            type=Path,
            help="JSON file with blocks of methods; others are chosen",
        )
        add("--state-tokens", type=int, default=2048, help="that states are chosen on")
        add("--prefix", default="", help="of the names of figures")
        add(
            "--tuned",
            nargs="*",
            default=[],
            help="those of the methods to patch by tuning, too",
        )

    @cached_property
    def text(self) -> HealingText:
        """Text for fitting patches and for healing, with held-out samples."""
        o = self.options
        samples = o.samples or max(
            max(o.steps) * o.batch, -(-o.patch_tokens // o.length)
        )
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
        if stage in PATCHES:
            patch = "tuned" if stage == "tuned" else "linear"
            return config.replace(patch=patch, method="none")
        settings = {"max_steps": steps, "per_device_train_batch_size": o.batch}
        settings |= {"learning_rate": o.rate, "save_steps": 25}
        return config.replace(patch="none", method=o.method, trainer=settings)

    def repair(
        self, removed: State, stage: str, steps: int = 0, name: str = ""
    ) -> Part:
        """Return the part that brings a state to a stage, from the one before, and evaluates it.

        Args:
            steps: training steps.
            name: folder of the part; by default the stage.
        """
        o = self.options

        def make(journal: Path) -> Content:
            folder = self.work / "models" / key(removed)
            cut = folder / "cut"
            out = folder / (name or stage)
            state = self.original.stack.remove(removed)
            if not cut.exists():
                excise(self.original.folder, state, cut)
            start = cut if stage in PATCHES else folder / "patched"
            # An existing checkpoint is complete: its evaluation was killed.
            if not out.exists():
                # Four samples are enough for the record; the evaluation texts measure the gain.
                text = dataclasses.replace(
                    self.text, report=self.text.report.select(range(4))
                )
                config = self._config(stage, steps)
                job = Job(self.original, state, start, text.train, out, config)
                heal_checkpoint(job, text, out)
            record = read(out / "healing.json")
            found = {
                "tokens_seen": record.get("tokens_seen"),
                "stopped": record.get("stopped"),
                "training": [step["loss"] for step in record["steps"]],
                **self._judged(
                    models.load(out, dtype=self.original.dtype_name), journal
                ),
            }
            if stage != "patched":
                shutil.rmtree(out)
            return found

        seen = (4.5 if o.method == "full" else 3) * steps * o.batch * o.length
        if stage in PATCHES:
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

    def choosing(self, method: str, m: int) -> Part:
        """Return the part that chooses the blocks of a method."""
        o = self.options
        n = len(self.replay)
        given = read(o.states).get(str(m), {}).get(method) if o.states else None

        def make(journal: Path) -> Content:
            if given:
                return {"removed": sorted(given)}
            text = self.texts.samples(TEXT, o.state_tokens)
            setting = Setting(
                self.replay, text, text, self.working(journal), o.seed, {}
            )
            name = method.removesuffix(f"-top{TOP}")
            return {"removed": choose(name, setting, [m])[method][0]["removed"]}

        price = 0.0 if given else cost(method, n, [m]) * o.state_tokens
        return Part(f"states/{method}/{m}", make, price)

    def chosen(self, m: int) -> dict[str, list[int]]:
        """Return the removed blocks of each method whose choice is finished."""
        known = [p for p in self.options.methods if self.done(f"states/{p}/{m}")]
        return {p: self.read(f"states/{p}/{m}")["removed"] for p in known}

    def training(self, steps: int) -> str:
        """Return the folder of the parts of a training."""
        return f"healed/{self.options.method}-{self.options.rate:g}-{steps}"

    def trainings(self, removed: list[int]) -> dict[str, Content]:
        """Return a state's finished trainings by tokens, and by recipe if it is not the usual."""
        found = {}
        for path in sorted((self.work / "parts/healed").glob(f"*/{key(removed)}.json")):
            usual = f"full-{USUAL_RATE:g}"
            recipe, _, steps = path.parent.name.rpartition("-")
            tokens = f"{(content := read(path))['tokens_seen'] / 1e6:.2g}M"
            name = tokens + f" {recipe}" * (recipe != usual)
            # Two lengths may round to the same tokens.
            found[name + f" {steps} steps" * (name in found)] = content
        return dict(sorted(found.items()))

    def parts(self) -> list[Part]:
        o = self.options
        found = [self.choosing(method, m) for m in o.remove for method in o.methods]
        if not all(self.done(part.name) for part in found):
            return found
        states = [s for m in o.remove for s in self.chosen(m).values()]
        found += [p for text in self.judged for p in self.losses(text, [(), *states])]
        found += [p for task in o.tasks for p in self.answers(task, [(), *states])]
        for m in o.remove:
            rows = self.chosen(m)
            found += [self.repair(removed, "patched") for removed in rows.values()]
            found += [self.repair(rows[p], "tuned") for p in o.tuned if p in rows]
            for steps in o.steps:
                name = self.training(steps)
                found += [self.repair(s, "healed", steps, name) for s in rows.values()]
        return found

    def collect(self) -> Content:
        removals = {}
        original = {
            text: self.rows(f"losses/{text}")["original"] for text in self.judged
        }
        answers = {task: self.rows(f"answers/{task}") for task in self.options.tasks}

        def right(name: str) -> Content:
            return {
                "accuracy": {
                    t: rows[name] for t, rows in answers.items() if name in rows
                }
            }

        for m in self.options.remove:
            rows = {}
            for method, removed in self.chosen(m).items():
                cut = {t: self.rows(f"losses/{t}")[key(removed)] for t in self.judged}
                stages = {"cut": judged_stage(cut, original) | right(key(removed))}
                for stage in (
                    s for s in STAGES[1:] if self.done(f"{s}/{key(removed)}")
                ):
                    found = self.read(f"{stage}/{key(removed)}")
                    rest = {"accuracy": found["accuracy"]}
                    stages[stage] = judged_stage(found["losses"], original) | rest
                for name, found in self.trainings(removed).items():
                    rest = {
                        k: found[k]
                        for k in ("tokens_seen", "stopped", "training", "accuracy")
                    }
                    stages[f"healed {name}"] = (
                        judged_stage(found["losses"], original) | rest
                    )
                rows[method] = {"removed": removed, "stages": stages}
            removals[str(m)] = rows
        o = self.options
        where = (
            o.states.name
            if o.states
            else f"chosen on {o.state_tokens} tokens of {TEXT}"
        )
        settings = {k: getattr(o, k) for k in self.settings} | {"prefix": o.prefix}
        made = {
            "settings": settings,
            "states_from": where,
            "provenance": self.provenance(),
        }
        return {**made, "original": right("original"), "removals": removals}

    show = staticmethod(show)


def judged_text(row: Content) -> Content:
    """Return the losses on one text, with standard errors over samples."""
    counts = np.array(row["counts"])
    found: Content = {"tokens": int(counts.sum())}
    for what in ("nll", "kl"):
        found[what] = mean_loss([row], what)
        found[f"{what}_se"] = float(standard_error(np.array([row[what]]), counts)[0])
        found[f"sample_{what}"] = row[what]
    return {**found, "sample_tokens": row["counts"]}


def judged_stage(losses: Content, original: Content) -> Content:
    """Return the losses on each text, and over all tokens of the texts."""
    before = {
        name: {"original_nll": mean_loss([row], "nll")}
        for name, row in original.items()
    }
    texts = {name: judged_text(row) | before[name] for name, row in losses.items()}
    weights = np.array([t["tokens"] for t in texts.values()], dtype=float)
    weights /= weights.sum()
    pooled = {what: mean_loss(losses.values(), what) for what in ("nll", "kl")}
    pooled["original_nll"] = mean_loss(original.values(), "nll")
    for what in ("nll_se", "kl_se"):
        errors = np.array([t[what] for t in texts.values()])
        pooled[what] = float(np.sqrt(weights**2 @ errors**2))
    return {"texts": texts, "pooled": pooled}
