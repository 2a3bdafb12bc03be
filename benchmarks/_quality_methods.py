"""The parts that choose blocks: every method on one text, with its price.

A part holds `choices`: method, remove, seed, removed, and the price as `passes` and `heads`,
full forward passes and output heads over the whole pool, counted as `isingcut.baselines` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _quality_bench import Bench
from _quality_rows import choice, ground_states, plain
from _quality_store import Part, Price
from _sliding_windows import NAME as MERGING
from isingcut.baselines import registry as baselines
from isingcut.baselines.base import Outcome, open_ledger
from isingcut.data.tokens import TokenSet
from isingcut.energies import registry as energies
from isingcut.energies.search import Search, Target
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.states import blocks_of, states_of

CHEAP: dict[str, tuple[str, dict[str, Any]]] = {
    "block-influence": ("block-influence", {}),
    "block-influence-iterative": ("block-influence", {"iterative": True}),
    "angular-window": ("angular-window", {}),
    "norm-ratio": ("norm-ratio", {}),
}
"""Methods of a few passes, each with one part for all removals."""

SLEB: dict[str, dict[str, Any]] = {
    "sleb": {},
    "sleb-kl": {"loss": "kl", "keep_ends": False},
}
"""SLEB as published (NLL, the ends kept), and on our loss."""

TOP = 20
"""States of an energy's spectrum that are measured."""


class Choosing:
    """The parts that choose on one text.

    Args:
        removals: the numbers of blocks to remove.
        short: leave out what the second table does not ask for.
    """

    def __init__(
        self, bench: Bench, text: str, removals: Sequence[int], *, short: bool = False
    ) -> None:
        self.bench, self.text, self.removals = bench, text, tuple(sorted(removals))
        self.short = short

    @property
    def tokens(self) -> TokenSet:
        return self.bench.pool(self.text)

    @property
    def wide(self) -> TokenSet:
        """The text of methods that measure most states on a part of it only."""
        return self.bench.wide_pool(self.text)

    @property
    def scale(self) -> float:
        """Passes over the pool that one pass over the wide text costs."""
        return float(self.wide.mask.sum() / self.tokens.mask.sum())

    def name(self, method: str, remove: int | None = None, seed: int | None = None) -> str:
        tail = "" if remove is None else f"/M{remove:02d}"
        tail += "" if seed is None else f"{'/' if remove is None else '-'}s{seed}"
        return f"choose/{self.text}/{method}{tail}"

    # parts --------------------------------------------------------------------------------

    def fixed(self) -> list[Part]:
        """Methods without a seed, in the order of their price."""
        parts = [self._cheap(method) for method in CHEAP]
        parts += [self._cbo(top, m) for top in (1, TOP) for m in self.removals]
        parts += [self._sleb(method) for method in SLEB]
        parts.append(self._pairwise())
        parts += [self._pairwise_top(m) for m in self.removals]
        if not self.short:
            parts += [self._merging(m) for m in self.removals]
        return parts

    def seeded(self, seed: int) -> list[Part]:
        """`random`, and `evopress` and `refined` for each removal at SLEB's budget."""
        pairs = [(self._refined(m, seed), self._evopress(m, seed)) for m in self.removals]
        return [self._random(seed), *(part for pair in pairs for part in pair)]

    def joint(self, seed: int) -> Part:
        """One search for all numbers of removals, at SLEB's budget for the largest."""
        largest = self.removals[-1]

        def make(journal: Path) -> dict[str, Any]:
            return self.search(self.removals, self.budget(largest), seed, journal, "refined-joint")

        name = self.name("refined-joint", seed=seed)
        return Part(name, make, (self._sleb_price(largest),), (self.name("sleb"),))

    # methods ------------------------------------------------------------------------------

    def _cheap(self, method: str) -> Part:
        key, options = CHEAP[method]

        def make(journal: Path) -> dict[str, Any]:
            part = baselines.get(key)(**options)
            found = {m: self._choose(part, m, 0, journal) for m in self.removals}
            return self._content(method, part, [choice(method, m, 0, found[m]) for m in found])

        passes = sum(self.removals) if options else len(self.removals)
        return Part(self.name(method), make, (self._price(passes, 0),))

    def _random(self, seed: int) -> Part:
        def make(journal: Path) -> dict[str, Any]:
            part = baselines.get("random")()
            found = {m: self._choose(part, m, seed, journal) for m in self.removals}
            rows = [choice("random", m, seed, found[m]) for m in self.removals]
            return self._content("random", part, rows)

        return Part(self.name("random", seed=seed), make)

    def _sleb(self, method: str) -> Part:
        options = SLEB[method]

        def make(journal: Path) -> dict[str, Any]:
            part = baselines.get("sleb")(**options)
            # The path to fewer removals is the beginning of the path to more: what it measured
            # is read back from the journal, and each number has its own price.
            found = {m: self._choose(part, m, 0, journal) for m in self.removals}
            rows = [choice(method, m, 0, found[m]) for m in self.removals]
            return self._content(
                method, part, rows, {"order": found[self.removals[-1]].info["order"]}
            )

        return Part(self.name(method), make, (self._sleb_price(self.removals[-1]),))

    def _cbo(self, top: int, remove: int) -> Part:
        method = "cbo" if top == 1 else f"cbo-top{top}"

        def make(journal: Path) -> dict[str, Any]:
            part = baselines.get("cbo")(top=top)
            found = self._choose(part, remove, 0, journal)
            return self._content(method, part, [choice(method, remove, 0, found)])

        states = top if top > 1 else 0
        return Part(
            self.name(method, remove),
            make,
            (self._price(3 + self._passes(states, remove), states),),
        )

    def _merging(self, remove: int) -> Part:
        def make(journal: Path) -> dict[str, Any]:
            part = baselines.get(MERGING)()
            found = self._choose(part, remove, 0, journal)
            row = choice(MERGING, remove, 0, found) | {"merges": plain(found.merges)}
            return self._content(MERGING, part, [row])

        return Part(self.name(MERGING, remove), make, (self._price(2 * remove, remove),))

    def _pairwise(self) -> Part:
        n = self.bench.n
        states = n * (n + 1) // 2

        def make(journal: Path) -> dict[str, Any]:
            part = energies.get("pairwise")()
            energy = part.measure(self.bench.replay, self.tokens, self.bench.work(journal))
            energy.save(self.energy_file)
            passes, heads = energy.meta["blocks_run"] / n, states + 1.0
            rows = []
            for m in self.removals:
                ground = ground_states(energy, m, 1)
                outcome = Outcome(tuple(ground[0]), passes, heads)
                rows.append(choice("pairwise", m, 0, outcome))
            return self._content("pairwise", part, rows)

        return Part(self.name("pairwise"), make, (self._price(n * n / 6 + 1, states + 1),))

    @property
    def energy_file(self) -> Path:
        """The pair energy measured on the pool, for other parts to use."""
        return self.bench.store.path(self.name("pairwise")).with_suffix(".safetensors")

    def _pairwise_top(self, remove: int) -> Part:
        method = f"pairwise-top{TOP}"

        def make(journal: Path) -> dict[str, Any]:
            energy = Hamiltonian.load(self.energy_file)
            states = states_of(self.bench.n, ground_states(energy, remove, TOP))
            work = self.bench.work(journal)
            ledger = open_ledger(self.bench.replay, self.tokens, work, "kl")
            best = states[int(np.argmin(ledger.losses(states)))]
            before = self.bench.store.read(self.name("pairwise"))["choices"][0]
            # The original's pass and head were paid for with the energy.
            outcome = Outcome(
                tuple(blocks_of(best)),
                before["passes"] + ledger.passes - 1,
                before["heads"] + ledger.heads - 1,
            )
            return self._content(
                method, energies.get("pairwise")(), [choice(method, remove, 0, outcome)]
            )

        price = self._price(self._passes(TOP, remove) + 1, TOP + 1)
        return Part(self.name(method, remove), make, (price,), (self.name("pairwise"),))

    def _evopress(self, remove: int, seed: int) -> Part:
        def make(journal: Path) -> dict[str, Any]:
            from _quality_evolution import within

            budget = self.budget(remove)
            part, found = within(self, remove, seed, budget, self.bench.work(journal))
            row = choice("evopress", remove, seed, found)
            return self._content("evopress", part, [row], {"budget": budget, **found.info})

        return Part(
            self.name("evopress", remove, seed),
            make,
            (self._sleb_price(remove),),
            (self.name("sleb"),),
        )

    def _refined(self, remove: int, seed: int) -> Part:
        def make(journal: Path) -> dict[str, Any]:
            return self.search((remove,), self.budget(remove), seed, journal, "refined")

        return Part(
            self.name("refined", remove, seed),
            make,
            (self._sleb_price(remove),),
            (self.name("sleb"),),
        )

    def search(
        self,
        removals: Sequence[int],
        budget: float,
        seed: int,
        journal: Path,
        method: str,
        tokens: TokenSet | None = None,
    ) -> dict[str, Any]:
        """A `refined` search of at most ``budget`` passes, as the content of a part."""
        pool = self.wide if tokens is None else tokens
        scale = self.scale if tokens is None else 1.0
        targets = [Target.count(self.bench.n, m) for m in sorted(removals)]
        work = self.bench.work(journal)
        found = Search(self.bench.replay, pool, work, targets, budget / scale, seed).run()
        paid = found.evaluator.ledger
        passes, heads = paid.passes * scale, paid.heads * scale
        rows = [
            choice(method, m, seed, Outcome(tuple(found.best(m)), passes, heads)) for m in removals
        ]
        trace = [{**t, "passes": t["passes"] * scale} for t in found.trace]
        more = {
            "budget": budget,
            "samples": pool.samples,
            "evaluations": len(found.evaluator.known),
            "trace": plain(trace),
        }
        asked = {"removals": sorted(removals), "passes": budget / scale}
        return self._content(method, asked, rows, more)

    # prices -------------------------------------------------------------------------------

    def budget(self, remove: int) -> float:
        """Passes that SLEB, as published, took to the same number of removals."""
        rows = self.bench.store.read(self.name("sleb"))["choices"]
        return float(next(r["passes"] for r in rows if r["remove"] == remove))

    def _price(self, passes: float, heads: float) -> Price:
        return Price(int(self.tokens.mask.sum()), passes, heads)

    def _sleb_price(self, remove: int) -> Price:
        n = self.bench.n
        kept = [n - s for s in range(remove)]
        return self._price(sum(k * k / 2 / n for k in kept), sum(kept))

    def _passes(self, states: int, remove: int) -> float:
        """Expected passes of so many states, with half of their blocks shared."""
        return states * (self.bench.n - remove) / self.bench.n / 2

    # content ------------------------------------------------------------------------------

    def _choose(self, part: Any, remove: int, seed: int, journal: Path) -> Outcome:
        found: Outcome = part.choose(
            self.bench.replay, self.tokens, remove, self.bench.work(journal), seed
        )
        return found

    def _content(
        self,
        method: str,
        part: Any,
        rows: list[dict[str, Any]],
        more: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        return {
            "method": method,
            "text": self.text,
            "options": plain(part if isinstance(part, dict) else dataclasses.asdict(part)),
            "pool_tokens": int(self.tokens.mask.sum()),
            "choices": rows,
            "more": plain(more or {}),
        }
