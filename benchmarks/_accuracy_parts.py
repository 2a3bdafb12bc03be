"""Parts of the accuracy benchmark: choose, ask and measure the cut models, repair some, ask again.

What is cut and not repaired is asked without being written: all states in one go, prefixes shared.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import _healing_parts as healing
from _accuracy_states import (
    METHODS,
    OURS,
    PAPER,
    PASSES,
    SCALED,
    Scaled,
    choose,
    choose_by,
    conversations,
    paper_energy,
    scales,
    stream_sizes,
)
from _healing_texts import judged_texts
from _healing_work import Part, key
from _parts_command import TASK_TOKENS, bits
from isingcut.data.calibration import build
from isingcut.data.tokens import TokenSet
from isingcut.evaluation.questions import prepare_task
from isingcut.evaluation.scores import Asked, Scores, score_states
from isingcut.files.writing import fingerprint
from isingcut.ising.states import states_of
from isingcut.measure.losses import measure
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.replay import Replay

GENERATED = ("gsm8k",)
ENERGY = "energy/paper"


class Bench(healing.Bench):
    """What can be made, and in which order."""

    @cached_property
    def replay(self) -> Replay:
        model = self.original.model
        return Replay(model, stack_modules(model, find_stack(model)))

    def measuring(self, name: str) -> Work:
        """With a journal of its own, so that a part that is interrupted goes on."""
        path = self.path(name).with_suffix(".journal")
        path.parent.mkdir(parents=True, exist_ok=True)
        return Work(self.options.batch_tokens, self.progress, path)

    @cached_property
    def chosen_on(self) -> TokenSet:
        o = self.options
        return build(
            o.calibration,
            self.original.tokenizer,
            samples=o.state_tokens // 256,
            rank_samples=2,
            report_samples=2,
            length=256,
            seed=0,
        ).splits["energy"]

    @cached_property
    def judged(self) -> dict[str, TokenSet]:
        tokens, tokenizer = self.options.judged_tokens, self.original.tokenizer
        return judged_texts(self.data, tokenizer, tokens, code=True, maths=True)

    def questions(self, task: str) -> int:
        """How many are asked."""
        counts: dict[str, int] = self.options.questions
        return counts.get(task, counts["each"])

    # choosing -----------------------------------------------------------------------------

    def choosing(self, method: str, m: int) -> Part:
        """What a method removes."""
        o, name = self.options, f"states/{method}/{m}"

        def make() -> dict[str, Any]:
            text, work = self.chosen_on, self.measuring(name)
            if method in PAPER:
                return choose_by(self.read(ENERGY), PAPER[method], self.replay, text, m, work)
            return choose(method, self.replay, text, m, work, o.seed)

        return Part(name, make, PASSES.get(method, m) * o.state_tokens)

    def energy(self) -> Part:
        """The paper's."""
        count = self.options.conversations

        def make() -> dict[str, Any]:
            text = conversations(self.data, self.original.tokenizer, count, 512)
            return paper_energy(self.replay, text, self.measuring(ENERGY))

        return Part(ENERGY, make, 3.0 * 250 * count)

    @property
    def methods(self) -> list[str]:
        return [m for m in METHODS if m in self.options.methods]

    def chosen(self, m: int) -> dict[str, list[int]]:
        return {
            method: [int(b) for b in self.read(f"states/{method}/{m}")["removed"]]
            for method in self.methods
        }

    def best_peers(self, m: int) -> list[str]:
        """The methods, other than ours, of the lowest KL over all judged texts, as many as are
        repaired; of equal states the first."""
        rows, found = self.chosen(m), dict[str, list[int]]()
        by_state = self.cut_losses()
        peers = [p for p in self.methods if p != OURS]
        for p in sorted(peers, key=lambda p: by_state[key(rows[p])]["kl"]):
            if rows[p] not in [rows[OURS], *found.values()]:
                found[p] = rows[p]
        return list(found)[: self.options.repaired_peers]

    # all cut states at once ---------------------------------------------------------------

    def variants(self) -> dict[str, tuple[list[int], str]]:
        """Blocks removed and the scaling behind them, by the name of what is asked."""
        found: dict[str, tuple[list[int], str]] = {"original": ([], "")}
        for m in self.options.remove:
            rows = self.chosen(m)
            found |= {key(removed): (removed, "") for removed in rows.values()}
            for kind in SCALED if "patched" in self.options.stages else ():
                found[f"{key(rows[OURS])} {kind}"] = (rows[OURS], kind)
        return found

    def asking(self, task: str) -> list[Part]:
        """A task for every cut state that it was not yet asked of."""
        seen = self.gathered(f"shared/{task}")
        fresh = {k: v for k, v in self.variants().items() if k not in seen}
        name = f"shared/{task}/{fingerprint(sorted(fresh))[:12]}"

        questions = self.questions(task)

        def make() -> dict[str, Any]:
            prepared = prepare_task(task, self.data, questions)
            model, work = Asked(self.original, self.scaled), self.measuring(name)
            found = score_states(model, prepared, self.removals(fresh), work)
            return {"rows": {k: self.graded(s) for k, s in zip(fresh, found, strict=True)}}

        cost = TASK_TOKENS[task] * questions * (0.2 + 0.45 * len(fresh))
        return [Part(name, make, cost)] if fresh else []

    def graded(self, scores: Scores) -> dict[str, Any]:
        """Right or wrong by question, and what it was computed in."""
        dtype = str(self.original.dtype).removeprefix("torch.")
        metric = scores.metric.removesuffix(",none")
        return {"metric": metric, "dtype": dtype, "right": bits(scores.values)}

    def measuring_losses(self, text: str) -> list[Part]:
        """KL and NLL of every cut state on a judged text."""
        seen = self.gathered(f"losses/{text}")
        fresh = {k: v for k, v in self.variants().items() if k not in seen}
        name = f"losses/{text}/{fingerprint(sorted(fresh))[:12]}"

        def make() -> dict[str, Any]:
            tokens, work = self.judged[text], self.measuring(name)
            states = states_of(len(self.scaled), self.removals(fresh))
            found = measure(
                self.scaled,
                tokens,
                states,
                batch_tokens=work.batch_tokens,
                progress=work.progress,
                journal=work.journal,
            )
            sums = zip(fresh, found.kl_sums, found.nll_sums, strict=True)
            rows = {k: {"kl": a.round(5).tolist(), "nll": b.round(5).tolist()} for k, a, b in sums}
            return {"counts": found.counts.tolist(), "rows": rows}

        cost = self.options.judged_tokens * (1 + 0.5 * len(fresh))
        return [Part(name, make, cost)] if fresh else []

    def gathered(self, folder: str) -> dict[str, Any]:
        """Rows of all finished parts in a folder."""
        found: dict[str, Any] = {}
        for path in sorted((self.work / "parts" / folder).glob("*.json")):
            part = self.read(f"{folder}/{path.stem}")
            more = {"counts": part["counts"]} if "counts" in part else {}
            found |= {k: {**row, **more} for k, row in part["rows"].items()}
        return found

    def cut_losses(self) -> dict[str, dict[str, float]]:
        """KL and NLL in nats a token over all judged texts, by state."""
        texts = [self.gathered(f"losses/{t}") for t in self.judged_names]
        return {
            k: {
                what: sum(sum(t[k][what]) for t in texts) / sum(sum(t[k]["counts"]) for t in texts)
                for what in ("kl", "nll")
            }
            for k in (texts[0] if texts else {})
            if all(k in t for t in texts)
        }

    judged_names = ("wikitext2", "c4", "instruct", "code", "maths")

    @cached_property
    def scaled(self) -> Scaled:
        """The model's blocks with the scalings that are asked."""
        found = {k: (removed, kind) for k, (removed, kind) in self.variants().items() if kind}
        if not found:
            return Scaled(self.replay, {})
        sizes = stream_sizes(self.replay, self.chosen_on, Work(self.options.batch_tokens))
        return Scaled(
            self.replay, {k: scales(kind, removed, sizes) for k, (removed, kind) in found.items()}
        )

    def removals(self, variants: dict[str, tuple[list[int], str]]) -> list[list[int]]:
        """Of each variant, what is removed of the stack with the scalings."""
        rows = variants.items()
        return [self.scaled.removal(removed, k if kind else "") for k, (removed, kind) in rows]

    # repaired models ----------------------------------------------------------------------

    def accuracy(self, removed: list[int], stage: str, task: str) -> Part:
        where = f"{key(removed)}/{stage}" if removed else "original"
        questions = self.questions(task)

        def make() -> dict[str, Any]:
            prepared = prepare_task(task, self.data, questions)
            model, without = Asked(self.original, self.replay), removed
            if removed and stage != "cut":
                model, without = Asked.whole(self.load(self.folder(removed, stage))), []
            work = self.measuring(f"accuracy/{where}/{task}")
            return self.graded(score_states(model, prepared, [without], work)[0])

        return Part(f"accuracy/{where}/{task}", make, 0.6 * TASK_TOKENS[task] * questions)

    def made(self, removed: list[int], stage: str) -> list[Part]:
        """What writes the checkpoint of a state at a stage."""
        if stage == "tuned":
            return [self.patch(removed, "tuned")]
        if stage == "healed":
            return [self.patch(removed), self.distil(removed)]
        return [self.last_blocks(removed)]

    def repairs(self, m: int, tasks: list[str]) -> list[Part]:
        """Repair, judge and ask each model of which something is not known yet."""
        found = list[Part]()
        for _, removed, stage in self.scored(m):
            asked = [self.accuracy(removed, stage, t) for t in tasks]
            learned = [self.judge(removed, stage), *asked]
            if not all(self.done(part.name) for part in learned):
                found += [*self.made(removed, stage), *learned]
        return found

    def last_blocks(self, removed: list[int]) -> Part:
        """The last blocks removed, and then the three last ones left and the head trained."""

        def make() -> dict[str, Any]:
            return self._heal(removed, "cut", "last3", patch="none", method="last:3")

        return Part(f"distil/{key(removed)}/last3", make, self._cost(self.options.steps))

    def scored(self, m: int) -> list[tuple[str, list[int], str]]:
        """Method, blocks and stage of what was repaired and is to be asked."""
        o, rows, found = self.options, self.chosen(m), list[tuple[str, list[int], str]]()
        stages = {"patched": "tuned", "healed": "healed"}
        for name in o.stages:
            if name in stages:
                found += [(p, rows[p], stages[name]) for p in (OURS, *self.best_peers(m))]
        if "healed" in o.stages and "last" in rows:
            found.append(("last", rows["last"], "last3"))
        return found

    def parts(self) -> list[Part]:
        o = self.options
        chosen = {p: [self.choosing(p, m) for m in o.remove] for p in self.methods}
        paper = [part for p in PAPER for part in chosen.get(p, [])]
        found = [self.energy()] if not all(self.done(part.name) for part in paper) else []
        found += [part for parts in chosen.values() for part in parts]
        if not all(self.done(part.name) for part in found):
            return found
        tasks = [t for t in o.tasks if t not in GENERATED]
        shared = [p for t in self.judged_names for p in self.measuring_losses(t)]
        shared += [p for t in tasks for p in self.asking(t)]
        if shared:
            return shared
        generated = [t for t in GENERATED if self.questions(t)]
        found = [part for m in o.remove for part in self.repairs(m, tasks)]
        found += [self.accuracy([], "original", t) for t in generated]
        for m in o.remove:
            rows = self.chosen(m)
            for p in (OURS, *self.best_peers(m)):
                found += [self.accuracy(rows[p], "cut", t) for t in generated]
            found += self.repairs(m, [*tasks, *generated])
        return list({part.name: part for part in found}.values())
