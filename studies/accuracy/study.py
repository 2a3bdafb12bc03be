"""Task accuracy of the methods' choices of blocks: cut, patched and healed.

Qwen2.5-Coder-1.5B-Instruct (downloaded with pip; `--model` takes any other), without 4 and without
7 of its 28 blocks. All methods choose on the same `--state-tokens` of `--calibration`; the paper's
energy (`cbo`) is measured on `--conversations` tokens of a separate text. `isingcut` and `evopress`
may take the passes of a greedy path, which is the cost of `sleb`. Questions are those of
lm-evaluation-harness, zero-shot except GSM8K (five examples, generated), on fixed subsets. Every
cut model is evaluated, all in one run with shared prefixes; on GSM8K only ours and the peers of the
lowest KL. These are also repaired: with the tuned patch, and healed. KL and perplexity are on text
that nothing was chosen, fitted or trained on: WikiText-2 test, C4, conversations, Python, word
problems.

Figures, in points of mean accuracy over the tasks without generation, with `_se`, the standard
error of the difference paired by question; `_M` blocks are removed:

accuracy_minus_block_influence_M, accuracy_minus_sleb_M, accuracy_minus_window_M  our cut model
  minus that method's
healed_accuracy_minus_best_peer_M  our healed model minus the best healed peer's

If some models of a stage were evaluated on fewer tasks, its means are over the tasks of all models.
`ours minus it` compares within a stage; for our own repaired models it is our cut model minus them.
The committed file also holds three stages from commit 70bd966: `last3` (the last blocks removed,
and the last three remaining ones trained), `length` and `channel` (the stream rescaled after each
cut).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from studies.accuracy.summary import OURS, show
from studies.runner import Content, Part, numbers
from studies.runner_choices import Setting, choose, cost
from studies.runner_models import key, mean_loss
from studies.runner_repair import RepairStudy

GENERATED = ("gsm8k",)
TASKS = [
    *("mmlu_0shot", "arc_easy", "arc_challenge", "hellaswag", "piqa"),
    *("winogrande", "boolq", "openbookqa", "gsm8k"),
]
CHOOSERS = (
    *("last", "block-influence", "block-influence-iterative", "angular-window", "norm-ratio"),
    *("sleb", "cbo", "evopress", OURS),
)


class Accuracy(RepairStudy):
    """Study of the answers of every method's cut model, and of some repaired ones."""

    name = "accuracy"
    questions = ("1000", "gsm8k=100")
    judged = ("wikitext2", "c4", "instruct", "code", "maths")
    defaults: ClassVar[Content] = {"model": "coder", "tasks": TASKS}
    settings = (*RepairStudy.settings, "calibration", "state_tokens", "conversations")

    @classmethod
    def add_options(cls, add: Callable[..., Any]) -> None:
        super().add_options(add)
        add("--remove", type=numbers, default=[7, 4])
        add("--methods", nargs="*", default=list(CHOOSERS), choices=CHOOSERS)
        add("--stages", nargs="*", default=["tuned", "healed"], choices=["tuned", "healed"])
        add("--calibration", default="wiki=0.75,python=0.25", help="text to choose on")
        add("--state-tokens", type=int, default=2048, help="of it")
        add("--conversations", type=int, default=87040, help="tokens of the paper's energy")
        add("--repaired-peers", type=int, default=2, help="how many, of the lowest KL")

    def choosing(self, method: str) -> Part:
        """Return the part that chooses the blocks of a method."""
        o = self.options

        def make(journal: Path) -> Content:
            text = fisher = self.texts.samples(o.calibration, o.state_tokens)
            if method == "cbo":
                chats = self.texts.conversations()
                fisher = self.texts.samples(chats, o.conversations, chat=True)
            setting = Setting(self.replay, text, text, fisher, self.working(journal), o.seed, {})
            return {"choices": choose(method, setting, o.remove)}

        price = cost(method, len(self.replay), o.remove) * o.state_tokens
        return Part(f"states/{method}", make, price + 3 * o.conversations * (method == "cbo"))

    def chosen(self, m: int) -> dict[str, Content]:
        """Return the choices of all methods, ours last."""
        found = {}
        for method in (m for m in CHOOSERS if m in self.options.methods):
            for name, rows in self.read(f"states/{method}")["choices"].items():
                found[name] = next(row for row in rows if row["remove"] == m)
        return found

    def repaired(self, m: int) -> list[str]:
        """Return the methods that are repaired: ours, if it is given, and those of lowest KL over
        all evaluation texts, of equal states the first."""
        rows = {p: c["removed"] for p, c in self.chosen(m).items()}
        losses = [self.rows(f"losses/{t}") for t in self.judged]
        kl = {p: mean_loss([r[key(s)] for r in losses], "kl") for p, s in rows.items()}
        found = {p: s for p, s in rows.items() if p == OURS}
        most = len(found) + self.options.repaired_peers
        for p in sorted(rows, key=kl.__getitem__):
            if len(found) < most and rows[p] not in found.values():
                found[p] = rows[p]
        return list(found)

    def repaired_tasks(self, stage: str) -> Sequence[str]:
        return [t for t in self.options.tasks if self.count(t) and stage != "patched"]

    def parts(self) -> list[Part]:
        o = self.options
        found = [self.choosing(p) for p in CHOOSERS if p in o.methods]
        if not all(self.done(part.name) for part in found):
            return found
        states = [c["removed"] for m in o.remove for c in self.chosen(m).values()]
        losses = [p for t in self.judged for p in self.losses(t, [(), *states])]
        tasks = [t for t in self.repaired_tasks("cut") if t not in GENERATED]
        found = losses + [p for t in tasks for p in self.answers(t, [(), *states])]
        if losses:
            return found
        rows = [self.chosen(m)[p]["removed"] for m in o.remove for p in self.repaired(m)]
        found += [self.repair(s, "patched") for s in rows] * ("healed" in o.stages)
        found += [self.repair(s, stage) for stage in o.stages for s in rows]
        generated = [t for t in self.repaired_tasks("cut") if t in GENERATED]
        return found + [p for t in generated for p in self.answers(t, [(), *rows])]

    def collect(self) -> Content:
        losses = {t: self.rows(f"losses/{t}") for t in self.judged}
        answers = {t: self.rows(f"answers/{t}") for t in self.repaired_tasks("cut")}

        def cut(name: str) -> Content:
            accuracy, texts = (
                {k: rows[name] for k, rows in found.items() if name in rows}
                for found in (answers, losses)
            )
            return {"accuracy": accuracy, "losses": texts}

        removals: Content = {}
        for m in self.options.remove:
            removals[str(m)], repaired = {}, self.repaired(m)
            for method, choice in self.chosen(m).items():
                name = key(choice["removed"])
                stages = {"cut": cut(name)}
                for stage in self.options.stages:
                    if method in repaired and self.done(f"{stage}/{name}"):
                        part = self.read(f"{stage}/{name}")
                        stages[stage] = {k: part[k] for k in ("accuracy", "losses")}
                removals[str(m)][method] = {
                    "removed": choice["removed"],
                    "passes": choice["passes"],
                    "stages": stages,
                }
        return {
            "settings": {k: getattr(self.options, k) for k in self.settings},
            "provenance": self.provenance(),
            "tasks": [t for t in answers if t not in GENERATED],
            "original": cut("original"),
            "removals": removals,
        }

    show = staticmethod(show)
