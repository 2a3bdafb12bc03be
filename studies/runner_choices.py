"""Block choices of the methods of the studies, and the cost of each choice.

Costs are counted as in `isingcut.baselines`: full forward passes and output heads over the text
that blocks are chosen on, shared prefixes once. `cbo` is the energy of arXiv 2602.00161.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from isingcut.baselines import registry
from isingcut.baselines.base import Outcome, open_ledger
from isingcut.data.tokens import TokenSet
from isingcut.energies.empirical_fisher import EmpiricalFisher
from isingcut.energies.pairwise import Pairwise
from isingcut.energies.search import Search, Target, greedy_price
from isingcut.ising.constraints import count
from isingcut.ising.hamiltonian import Hamiltonian
from isingcut.ising.problem import Problem
from isingcut.ising.solvers import solve
from isingcut.measure.work import Work
from isingcut.models.replay import Replay
from studies.evopress.isingcut_evopress import Evopress
from studies.runner import Content

PLAIN = ("random", "block-influence", "angular-window", "sleb")
BASELINES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in PLAIN},
    "sleb-kl": ("sleb", {"loss": "kl", "keep_ends": False}),
}
TOP = 20
FIRST_STEP = 2048
LAST_STEP = 32768
"""Tokens of EvoPress's first and last selection step; at most a quarter of the text, and all."""
DEAR = (
    "sleb",
    "sleb-kl",
    "evopress",
    "refined",
    "refined-joint",
    "isingcut",
    "pairwise",
)


@dataclass(frozen=True)
class Setting:
    """Model, texts and settings that a method chooses with.

    Attributes:
        tokens: text to choose on; costs are counted in passes over it.
        wide: text of the methods that draw parts of it.
        budgets: maximum passes of EvoPress by number of blocks; by default a greedy path's cost.
    """

    replay: Replay
    tokens: TokenSet
    wide: TokenSet
    work: Work
    seed: int
    budgets: Mapping[int, float]

    def working(self, what: str) -> Work:
        """Return the work settings with a separate journal for one measurement of a method."""
        journal = self.work.journal
        return replace(
            self.work, journal=journal and journal.with_name(f"{journal.name}-{what}")
        )

    def priced(self, removed: Sequence[int], passes: float, heads: float) -> Outcome:
        """Return a choice; its cost is converted from passes over ``wide`` to ``tokens``."""
        scale = float(self.wide.mask.sum() / self.tokens.mask.sum())
        return Outcome(tuple(sorted(map(int, removed))), passes * scale, heads * scale)


def choose(
    method: str, s: Setting, removals: Sequence[int]
) -> dict[str, list[Content]]:
    """Return the choices of a method for some numbers of blocks, by entry name.

    `cbo` and `pairwise` have two entries: the ground state, and the best of the `TOP` lowest.
    """
    n = len(s.replay)
    found: dict[str, dict[int, Outcome]] = {}
    if method in BASELINES:
        name, options = BASELINES[method]
        part = registry.get(name)(**options)
        work = s.working("losses")
        found[method] = {
            m: part.choose(s.replay, s.tokens, m, work, s.seed) for m in removals
        }
    elif method in ("last", "before-last"):
        end = n - (method == "before-last")
        found[method] = {
            m: Outcome(tuple(range(end - m, end)), 0.0, 0.0) for m in removals
        }
    elif method == "evopress":
        found[method] = {m: _evolution(s, m) for m in removals}
    elif method == "refined-joint":
        found[method] = _search(s, removals)
    elif method in ("refined", "isingcut"):
        found[method] = {m: _search(s, [m])[m] for m in removals}
    else:
        if method == "pairwise":
            energy = Pairwise().measure(s.replay, s.tokens, s.working("energy"))
            paid = energy.meta["blocks_run"] / n, n * (n + 1) // 2 + 1.0
        else:
            energy = EmpiricalFisher().measure(s.replay, s.tokens, s.working("energy"))
            paid = 3.0, 3.0
        for top, name in ((1, method), (TOP, f"{method}-top{TOP}")):
            found[name] = {m: _lowest(s, energy, paid, m, top) for m in removals}
    return {
        name: [
            {
                "remove": m,
                "seed": s.seed,
                "removed": sorted(map(int, o.removed)),
                "passes": float(o.passes),
                "heads": float(o.heads),
            }
            for m, o in outcomes.items()
        ]
        for name, outcomes in found.items()
    }


def _lowest(
    s: Setting, energy: Hamiltonian, paid: Any, remove: int, top: int
) -> Outcome:
    """Return an energy's ground state, or the state of lowest KL among its ``top`` lowest."""
    spectrum = solve(Problem(energy, [count(energy.n, remove)]), k=top)
    passes, heads = paid
    if top == 1:
        return Outcome(tuple(spectrum.removed(0)), passes, heads)
    ledger = open_ledger(s.replay, s.tokens, s.working("losses"), "kl")
    best = int(np.argmin(ledger.losses(spectrum.states)))
    # The cost of the energy already includes the original's pass and head.
    passes = passes + ledger.passes - 1
    heads = heads + ledger.heads - 1
    return Outcome(tuple(spectrum.removed(best)), passes, heads)


def _search(s: Setting, removals: Sequence[int]) -> dict[int, Outcome]:
    """Run the package's search, jointly for all numbers of blocks."""
    targets = [Target.count(len(s.replay), m) for m in sorted(removals)]
    work = s.working("search-" + "-".join(map(str, removals)))
    found = Search(s.replay, s.wide, work, targets, seed=s.seed).run()
    paid = found.evaluator.ledger
    return {
        goal.target.low: s.priced(goal.removed, paid.passes, paid.heads)
        for goal in found.goals
    }


def _evolution(s: Setting, remove: int) -> Outcome:
    """Run EvoPress with the most generations within the budget.

    If none fits, the number of random initial states is halved. A longer run begins like a shorter
    one and takes that one's measurements from the journal.
    """
    held = int(s.wide.mask.sum())
    first = FIRST_STEP if held >= 4 * FIRST_STEP else max(1, held // 4)
    steps = (first, min(LAST_STEP, held))
    best = None
    budget = s.budgets.get(remove) or greedy_price(len(s.replay), remove)
    published = math.ceil(remove * (len(s.replay) - remove) / 1.5)
    for initial in (64, 32, 16, 8, 4, 2, 1):
        for generations in range(published + 1):
            part = Evopress(generations=generations, step_tokens=steps, initial=initial)
            found = part.choose(s.replay, s.wide, remove, s.working("wide"), s.seed)
            longer = s.priced(found.removed, found.passes, found.heads)
            if longer.passes > budget:
                break
            best = longer
        if best:
            break
    return best or longer


def cost(method: str, n: int, removals: Sequence[int]) -> float:
    """Return the estimated cost of choices, in passes over the text."""
    return sum(greedy_price(n, m) if method in DEAR else 4.0 for m in removals)
