"""Which loss should be minimised? Rank correlations of losses on texts with task accuracy.

Many states of one model remove the same number of blocks. For SmolLM2 without 6 blocks they are the
choices of all methods in the results of the quality study, and three states with one or two blocks
exchanged; otherwise (`--model coder`: the one of the accuracy study, with its own `--results`) runs
of blocks and exchanges in them. Each state is measured on each text (KL to the original and NLL,
nats per token) and evaluated on each task, as `isingcut run --tasks` does. Some states, evenly
spread over the order by KL, are repaired and evaluated again: with the fitted patch, and after
`--steps` of healing.

Figures, over the states; `coder_` is in front of them for the second model:

objective_spearman_NAME  Spearman's rank correlation of the mean accuracy over the tasks with the
  negative of a loss: KL or NLL (`nll_`) on a text, or the KL on a mixture of texts. 1: the loss
  orders the states as the accuracy does. Intervals are from 2,000 bootstrap samples over states and
  questions
patched_spearman_NAME, healed_spearman_NAME  for the repaired states: the same of their accuracy
  with the loss of the cut state, which a choice is based on; own_NAME: with the KL of the repaired
  state itself, on texts that no repair has seen; cut_accuracy: with the accuracy of the cut state
reliability  the same between the accuracies on two halves of the questions (mean of 200 splits),
  extended to all questions by the Spearman-Brown formula; its square root is about the highest
  correlation that can be expected of an objective
half_spearman_scores, half_spearman_certainties  the rank correlation of the accuracy on half of the
  questions with the accuracy, and with the log-probability of right answers, on the other half
default_objective  the mixture of the highest correlation

The tables also show by how much each objective is above a run's default mixture, paired over the
same bootstrap samples. The second table is of the half of the states with the lowest KL, among
which a search chooses.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.errors import InputError
from studies.objectives.summary import REPAIRED, show
from studies.runner import STUDIES, Content, Part, read
from studies.runner_models import key, mean_loss
from studies.runner_repair import RepairStudy

UNSEEN = ("web", "stories", "instruct", "answers", "maths", "qa")
"""Texts of the study that no repair is fitted or trained on."""
QUALITY = STUDIES / "quality" / "results" / "quality.json"


class Objectives(RepairStudy):
    """Study of the losses and answers of many states."""

    name = "objectives"
    judged = ("web", "wiki", "stories", "python", "instruct", "answers", "maths", "qa")
    defaults: ClassVar[Content] = {
        "tasks": ["arc_easy", "piqa", "lambada", "hellaswag"],
        "judged_tokens": 2560,
        "steps": [20],
        "patch_tokens": 16384,
    }
    settings = (*RepairStudy.settings, "remove", "states")

    @classmethod
    def add_options(cls, add: Callable[..., Any]) -> None:
        super().add_options(add)
        add("--remove", type=int, default=6)
        add("--states", type=int, default=44, help="of so many states")
        add("--repaired", type=int, default=16, help="of so many of the states")

    @cached_property
    def states(self) -> list[list[int]]:
        o, n = self.options, len(self.replay)
        if (o.model, o.remove) == ("smollm2", 6):
            return chosen_states(o.states, n)
        return windows(o.remove, o.states, n)

    def repaired_texts(self, stage: str) -> dict[str, TokenSet]:
        return {name: self.judged_text(name) for name in UNSEEN}

    def parts(self) -> list[Part]:
        states = [[], *self.states]
        losses = [p for text in self.judged for p in self.losses(text, states)]
        found = losses + [p for t in self.options.tasks for p in self.answers(t, states)]
        if losses:
            return found
        rows = [self.rows(f"losses/{text}") for text in self.judged]
        kl = [sum(mean_loss([r[key(s)]], "kl") for r in rows) for s in self.states]
        repaired = [self.states[i] for i in spread(kl, self.options.repaired)]
        return found + [self.repair(s, stage) for s in repaired for stage in REPAIRED]

    def collect(self) -> Content:
        losses: Content = {}
        for text in self.judged:
            found = self.rows(f"losses/{text}")
            rows = [found[key(s)] for s in self.states]
            kl, nll = ([round(mean_loss([r], w), 5) for r in rows] for w in ("kl", "nll"))
            losses[text] = {"tokens": sum(rows[0]["counts"]), "kl": kl, "nll": nll}
        tasks = {t: self.rows(f"answers/{t}") for t in self.options.tasks}

        def answers(what: str) -> Content:
            return {t: [rows[key(s)][what] for s in self.states] for t, rows in tasks.items()}

        return {
            "settings": {k: getattr(self.options, k) for k in self.settings},
            "provenance": self.provenance(),
            "states": self.states,
            "losses": losses,
            "original": {t: rows["original"]["right"] for t, rows in tasks.items()},
            "right": answers("right"),
            "certainties": answers("certainties"),
            "repaired": [
                {"state": s, **{stage: self._repaired(s, stage) for stage in REPAIRED}}
                for s in self.states
                if all(self.done(f"{stage}/{key(s)}") for stage in REPAIRED)
            ],
        }

    def _repaired(self, state: list[int], stage: str) -> Content:
        part = self.read(f"{stage}/{key(state)}")
        losses = {
            text: {what: round(mean_loss([row], what), 5) for what in ("kl", "nll")}
            for text, row in part["losses"].items()
        }
        return {"losses": losses, "right": {t: a["right"] for t, a in part["accuracy"].items()}}

    show = staticmethod(show)


def spread(values: Any, count: int) -> list[int]:
    """Return ``count`` indices, evenly spaced in the order of the values, including both ends."""
    order = np.argsort(values, kind="stable")
    count = min(count, len(order))
    return [int(i) for i in order[np.linspace(0, len(order) - 1, count).round().astype(int)]]


def chosen_states(count: int, n: int) -> list[list[int]]:
    """Return the states chosen in the quality study, and three states with blocks exchanged."""
    tables = [t for t in read(QUALITY)["tables"] if t["remove"] == 6]
    choices = [c for t in tables for entry in t["methods"] for c in (entry, *entry["runs"])]
    found = dict.fromkeys(tuple(choice["removed"]) for choice in choices)
    starts = [list(range(13, 19)), [12, 13, 14, 17, 25, 26], [5, 12, 14, 16, 17, 18]]
    return exchanged([list(s) for s in found], starts, count, n)


def windows(m: int, count: int, n: int) -> list[list[int]]:
    """Return runs of blocks without a sixth at both ends, and exchanges in the middle three."""
    states = [list(range(a, a + m)) for a in range(n // 6, n - n // 6 - m + 1)]
    middle = len(states) // 2
    return exchanged(states[:count], states[middle - 1 : middle + 2], count, n)


def exchanged(
    states: list[list[int]], starts: list[list[int]], count: int, n: int
) -> list[list[int]]:
    """Extend states to ``count`` with starts that have one or two blocks exchanged."""
    draw = random.Random(0)
    for _ in range(100 * count):
        if len(states) >= count:
            return states
        state, k = set(draw.choice(starts)), draw.choice((1, 2))
        state -= set(draw.sample(sorted(state), min(k, len(state))))
        more = len(starts[0]) - len(state)
        state |= set(draw.sample([i for i in range(1, n - 1) if i not in state], more))
        if sorted(state) not in states:
            states.append(sorted(state))
    raise InputError(f"found only {len(states)} states of the {count}; lower --states")
