"""What healing wins back: the patch alone, and with distillation, for our state and the peers'.

The states are chosen on `--state-tokens`, ours with the passes of a greedy path; `--states FILE`
gives them ({"9": {"isingcut": [...], "block-influence": [...], ...}}). Each is cut, patched by
least squares and distilled with the same text, steps and seed: Wikipedia leads, conversations and
Python code. Of our state there is the tuned patch too, which is the product's default without a
distillation. What is healed for us is chosen by a trial: our state and the two that
one pass finds are healed for `--top-steps`, judged on text held out of the training, and the one of
lowest KL is healed for long. All is judged at every stage on text that nothing was chosen, fitted
or trained on. `--model coder` is the second model: give it `--results` of its own.

Figures, for M removed blocks, pooled over all tokens of the judged texts; `coder_` before them for
the second model:

recovered_percent_M  share of the log-perplexity that our cut lost which patch and distillation won
  back, the healed state being the chosen one
patch_percent_M  the same for the tuned patch alone
healed_ppl_over_best_peer_M  healed perplexity over that of the best healed peer; below 1 is a win,
  1 where the chosen state is that peer's
cut_ppl_over_best_peer_M  the same before healing

Of the committed `patches.json` (commit 70bd966), where patches were fitted and tuned on
conversations and Wikipedia leads alone: linear_percent_M, tuned_percent_M, as patch_percent_M, and
tuned_kl_over_linear_M, the ratio of their KL.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from isingcut.data.tokens import TokenSet
from isingcut.measure.losses import standard_error
from isingcut.options.config import TEXT
from studies.healing.summary import OURS, PEERS, STAGES, show
from studies.runner import Content, Part, numbers, read
from studies.runner_choices import Setting, choose, cost
from studies.runner_models import key, mean_loss
from studies.runner_repair import RepairStudy

TRIED = (OURS, "block-influence", "angular-window")
"""States that are healed for a few steps, the best of them for long: ours, and one-pass ones."""


class Healing(RepairStudy):
    """Our state and the peers', repaired."""

    name = "healing"
    judged = ("wikitext2", "c4", "instruct", "code")
    settings = (*RepairStudy.settings, "top_steps", "state_tokens", "states")

    @classmethod
    def add_options(cls, add: Callable[..., Any]) -> None:
        super().add_options(add)
        add("--remove", type=numbers, default=[9, 6, 12])
        add("--states", type=Path, help="JSON file with each method's blocks")
        add("--state-tokens", type=int, default=2048, help="that states are chosen on")
        add("--top-steps", type=int, default=20, help="for each candidate; 0: heal ours untried")

    def choosing(self, method: str) -> Part:
        """What a method removes."""
        o, n = self.options, len(self.replay)

        def make(journal: Path) -> Content:
            if o.states:
                rows = read(o.states)
                return {"states": {m: sorted(rows[str(m)][method]) for m in o.remove}}
            text = self.texts.samples(TEXT, o.state_tokens)
            setting = Setting(self.replay, text, text, text, self.working(journal), o.seed, {})
            rows = choose(method, setting, o.remove)[method]
            return {"states": {r["remove"]: r["removed"] for r in rows}}

        price = 0.0 if o.states else cost(method, n, o.remove) * o.state_tokens
        return Part(f"states/{method}", make, price)

    def chosen(self, m: int) -> dict[str, list[int]]:
        """Each method's blocks."""
        return {p: self.read(f"states/{p}")["states"][str(m)] for p in (OURS, *PEERS)}

    def repaired_texts(self, stage: str) -> dict[str, TokenSet]:
        return {"held out": self.text.report} if stage == "tried" else super().repaired_texts(stage)

    def parts(self) -> list[Part]:
        found = [self.choosing(method) for method in (OURS, *PEERS)]
        if not all(self.done(part.name) for part in found):
            return found
        removals = self.options.remove
        states = [s for m in removals for s in self.chosen(m).values()]
        found += [p for text in self.judged for p in self.losses(text, [(), *states])]
        for m in removals:
            rows = self.chosen(m)
            found += [self.repair(removed, "patched") for removed in rows.values()]
            found.append(self.repair(rows[OURS], "tuned"))
            tried = TRIED if self.options.top_steps else ()
            steps = self.options.top_steps
            found += [self.repair(rows[p], "tried", steps=steps) for p in tried]
            ours = self.after_trial(m)
            healed = [*PEERS, *([ours] if ours else [])]
            found += [self.repair(rows[p], "healed") for p in healed]
        return found

    def trial(self, removed: list[int]) -> Content | None:
        """Losses of a candidate on the text held out."""
        name = f"tried/{key(removed)}"
        return self.read(name)["losses"]["held out"] if self.done(name) else None

    def after_trial(self, m: int) -> str | None:
        """Whose state is healed for us: the candidate of the lowest KL, once all were tried."""
        rows = self.chosen(m)
        if not self.options.top_steps:
            return OURS
        trials = {p: self.trial(rows[p]) for p in TRIED}
        kl = {p: mean_loss([t], "kl") for p, t in trials.items() if t}
        return min(TRIED, key=kl.__getitem__) if len(kl) == len(TRIED) else None

    def collect(self) -> Content:
        removals = {}
        original = {text: self.rows(f"losses/{text}")["original"] for text in self.judged}
        for m in self.options.remove:
            rows = {}
            for method, removed in self.chosen(m).items():
                after = self.after_trial(m) if method == OURS else method
                healed = self.chosen(m)[after] if after else []
                trial, stages = self.trial(removed), {}
                for stage in STAGES:
                    name = f"{stage}/{key(healed if stage == 'healed' else removed)}"
                    if stage == "cut":
                        cut = {t: self.rows(f"losses/{t}")[key(removed)] for t in self.judged}
                        stages[stage] = judged_stage(cut, original)
                    elif self.done(name):
                        stages[stage] = judged_stage(self.read(name)["losses"], original)
                name = f"healed/{key(healed)}"
                training = self.read(name) if self.done(name) else {}
                rows[method] = {
                    "removed": removed,
                    "healed_state_of": after,
                    "trial": judged_text(trial) if trial else None,
                    "tokens_seen": training.get("tokens_seen"),
                    "losses": training.get("training", []),
                    "stages": stages,
                }
            removals[str(m)] = rows
        o = self.options
        where = o.states.name if o.states else f"chosen on {o.state_tokens} tokens of {TEXT}"
        settings = {k: getattr(o, k) for k in self.settings if k != "states"}
        made = {"settings": settings, "states_from": where, "provenance": self.provenance()}
        return {**made, "removals": removals}

    show = staticmethod(show)


def judged_text(row: Content) -> Content:
    """Losses on one text, with standard errors over samples."""
    counts = np.array(row["counts"])
    found: Content = {"tokens": int(counts.sum())}
    for what in ("nll", "kl"):
        found[what] = mean_loss([row], what)
        found[f"{what}_se"] = float(standard_error(np.array([row[what]]), counts)[0])
        found[f"sample_{what}"] = row[what]
    return {**found, "sample_tokens": row["counts"]}


def judged_stage(losses: Content, original: Content) -> Content:
    """Losses on each text, and over all tokens of the texts."""
    texts = {name: judged_text(row) for name, row in losses.items()}
    weights = np.array([t["tokens"] for t in texts.values()], dtype=float)
    weights /= weights.sum()
    pooled = {what: mean_loss(losses.values(), what) for what in ("nll", "kl")}
    pooled["original_nll"] = mean_loss(original.values(), "nll")
    for what in ("nll_se", "kl_se"):
        errors = np.array([t[what] for t in texts.values()])
        pooled[what] = float(np.sqrt(weights**2 @ errors**2))
    return {"texts": texts, "pooled": pooled}
