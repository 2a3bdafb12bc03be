"""Block choices of every method: their cost, and the loss of the cut models.

Every method chooses on the same `--pool` samples. Costs have one unit: full forward passes (block
evaluations over the number of blocks) and output heads over the whole pool, with shared prefixes
counted once for every method. The two methods that measure most states on parts of their text,
`evopress` and `refined`, draw these from `--search-pool` samples, which include the pool. Their
costs are counted in passes over the pool too: the same budget measures fewer states on more text.
`evopress` gets at most the passes that SLEB, as published, took to the same number of removals;
`refined` takes its own default budget, and `refined-joint` that of one search for all numbers. KL
is to the original model, in nats per token.

Figures, from the table of the first text that blocks are chosen on:

refined_kl_over_best_baseline_M  KL of `refined` over the lowest KL of all other methods (the
    pair energy and our variants of published methods included, `refined-joint` not), pooled over
    all tokens of the evaluation texts. The median run represents a method with several seeds.
refined_lowest_or_within  share of the combinations of a number of removals, an evaluation text and
    a measure (KL, perplexity) in which `refined` is the lowest of the same methods, or the 95 %
    interval of its difference from the lowest other one reaches zero (paired bootstrap over
    samples, 2,000 resamples).
refined_mean_kl_over_best_baseline  the mean over the numbers of removals of the pooled KL of
    `refined`, over the lowest such mean of another method.
refined_price_over_sleb  passes of `refined` over those of SLEB for the same number of removals, or
    the ratio of heads if that is larger; the maximum over numbers and seeds.

The committed file also holds, from commit 70bd966, accuracies and the rank correlations of energies
with measured losses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from isingcut.data.tokens import TokenSet
from studies.quality.summary import show
from studies.quality.tables import judged_text, tables
from studies.runner import Content, Part, numbers
from studies.runner_choices import BASELINES, Setting, choose, cost
from studies.runner_models import ModelStudy

FIXED = (*(m for m in BASELINES if m != "random"), "cbo", "pairwise")
SEEDED = ("random", "evopress", "refined")


class Quality(ModelStudy):
    """Study of the choices of every method, evaluated on text that nothing was chosen on."""

    name = "quality"
    judged = ("wikitext2", "c4", "instruct")
    defaults: ClassVar[Content] = {"judged_tokens": 8192}
    settings = (*ModelStudy.settings, "pool", "search_pool")

    @classmethod
    def add_options(cls, add: Callable[..., Any]) -> None:
        super().add_options(add)
        add(
            "--remove",
            type=numbers,
            default=[3, 6, 9, 12, 15],
            help="numbers of blocks",
        )
        add(
            "--second-remove",
            type=numbers,
            default=[6, 12],
            help="the same on instructions",
        )
        add("--pool", type=int, default=8, help="samples to choose on")
        add(
            "--search-pool",
            type=int,
            default=16,
            help="samples for evopress and refined",
        )
        add("--seeds", type=int, default=3, help="runs of methods that are random")

    @cached_property
    def pools(self) -> dict[str, tuple[TokenSet, TokenSet]]:
        """Pool and search pool, by the name of the text that blocks are chosen on."""
        o = self.options
        sizes = [samples * o.length for samples in (o.pool, o.search_pool)]
        chats = self.texts.conversations()
        wiki, wide = (self.texts.samples("wiki", tokens) for tokens in sizes)
        few, more = (self.texts.samples(chats, tokens, chat=True) for tokens in sizes)
        return {"wiki": (wiki, wide), "instruct": (few, more)}

    def choosing(self, text: str, method: str, seed: int) -> Part:
        """Return the part of a method's choices on a text, for all numbers of blocks."""
        o = self.options
        pool, wide = self.pools[text]
        removals = o.second_remove if text == "instruct" else o.remove

        def make(journal: Path) -> Content:
            budgets: dict[int, float] = {}
            if method == "evopress":
                rows = self.read(f"choose/{text}/sleb-s0")["choices"]["sleb"]
                budgets = {r["remove"]: r["passes"] for r in rows}
            work = self.working(journal)
            setting = Setting(self.replay, pool, wide, work, seed, budgets)
            found = choose(method, setting, removals)
            return {"text": text, "pool_tokens": int(pool.mask.sum()), "choices": found}

        price = cost(method, len(self.replay), removals) * o.pool * o.length
        return Part(f"choose/{text}/{method}-s{seed}", make, price)

    def parts(self) -> list[Part]:
        found = [
            self.choosing(text, method, 0) for text in self.pools for method in FIXED
        ]
        for seed in range(self.options.seeds):
            for i, text in enumerate(self.pools):
                joint = ("refined-joint",) if i == 0 else ()
                found += [
                    self.choosing(text, method, seed) for method in (*SEEDED, *joint)
                ]
        states = [row["removed"] for row in self.choices()]
        return found + [p for t in self.judged for p in self.losses(t, [(), *states])]

    def choices(self) -> list[Content]:
        """Return all choices that are finished."""
        return [
            {"text": part["text"], "method": method, **row}
            for part in self.under("choose")
            for method, rows in part["choices"].items()
            for row in rows
        ]

    def collect(self) -> Content:
        found = {text: self.rows(f"losses/{text}") for text in self.judged}
        losses = {text: rows for text, rows in found.items() if rows}
        return {
            "provenance": {
                **self.provenance(),
                "tokens_chosen_on": {
                    p["text"]: p["pool_tokens"] for p in self.under("choose")
                },
            },
            "judged": {text: judged_text(rows) for text, rows in losses.items()},
            "tables": tables(self.choices(), losses),
        }

    show = staticmethod(show)
