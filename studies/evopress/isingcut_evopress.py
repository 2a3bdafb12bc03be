"""Baseline `evopress`: an evolution of the set of removed blocks; an example of a plug-in.

    pip install ./studies/evopress

It is a (1 + lambda) evolution with selection in steps. A generation makes `offspring` children of
the parent, each by exchanging one to three removed blocks for kept ones (the smaller of two uniform
draws). All children are measured on few tokens; the best go on to more tokens; in the last step the
parent is measured with them on the same tokens, and the best of all is the next parent. Every step
draws new text.

Source: Sieberling et al., arXiv 2410.14649, algorithm 1 with level-switch mutation, and the
depth-pruning settings of the script its authors published: the best of 64 random states on 2,048
tokens starts, M (N - M) / 1.5 generations (rounded down), 32 offspring, 2 survivors on 2,048
tokens, 1 on 32,768, KL to the original, text drawn from 131,072 tokens. This code differs: whole
blocks are removed (the paper drops attention and MLP separately); children are distinct from each
other and from the parent; text is drawn in whole samples of the given set, and a step that needs
more tokens than the set has uses all of it.
"""

from dataclasses import dataclass

import numpy as np

from isingcut.baselines.base import Outcome, open_ledger
from isingcut.data.tokens import TokenSet
from isingcut.ising.states import Bools, States, blocks_of, key_of
from isingcut.measure.ledger import Ledger
from isingcut.measure.work import Work
from isingcut.models.replay import Replay


@dataclass(frozen=True)
class Evopress:
    """EvoPress' evolutionary search.

    Attributes:
        generations: None takes the published M (N - M) / 1.5, rounded down, at least 1.
        offspring: children per generation.
        survivors: number of states that each selection step keeps; the last must be 1.
        step_tokens: tokens of each selection step.
        initial: number of random states; the best one on the first step's tokens is the first
            parent.
    """

    generations: int | None = None
    offspring: int = 32
    survivors: tuple[int, ...] = (2, 1)
    step_tokens: tuple[int, ...] = (2048, 32768)
    initial: int = 64

    def choose(
        self, replay: Replay, tokens: TokenSet, remove: int, work: Work, seed: int
    ) -> Outcome:
        """Choose the last parent."""
        n = len(replay)
        rng = np.random.default_rng([seed, 0xE0])
        ledger = open_ledger(replay, tokens, work, "kl")
        generations = self.generations
        if generations is None:
            generations = max(1, int(remove * (n - remove) / 1.5))
        drawn = rng.random((self.initial, n)).argsort(1).argsort(1) < remove
        rows = _rows(rng, tokens, self.step_tokens[0])
        parent = _best(ledger, drawn, rows, 1, "the first parent")[0]
        improved = 0
        for g in range(generations):
            pool = _children(rng, parent, self.offspring)
            steps = list(zip(self.survivors, self.step_tokens, strict=True))
            for s, (kept, wanted) in enumerate(steps):
                if s == len(steps) - 1:
                    pool = np.concatenate([parent[None], pool])
                rows = _rows(rng, tokens, wanted)
                pool = _best(
                    ledger, pool, rows, kept, f"generation {g + 1} of {generations}"
                )
            improved += int((pool[0] != parent).any())
            parent = pool[0]
        info = {"generations": generations, "improved": improved}
        removed = tuple(blocks_of(parent))
        return Outcome(removed, ledger.passes, ledger.heads, info)


def _best(
    ledger: Ledger, states: States, rows: list[int], count: int, words: str
) -> States:
    """Return the ``count`` states of lowest loss on the rows; ties go to the earlier one."""
    (sums,) = ledger.sums([(states, rows)], f"{words}: {len(states)} states")
    losses = sums.sum(1) / ledger.counts[rows].sum()
    return states[np.argsort(losses, kind="stable")[:count]]


def _rows(rng: np.random.Generator, tokens: TokenSet, wanted: int) -> list[int]:
    """Draw samples without replacement until they have ``wanted`` tokens, or all are drawn."""
    order = rng.permutation(tokens.samples)
    total = np.cumsum(tokens.mask.sum(1).numpy()[order])
    return sorted(order[: int(np.searchsorted(total, wanted)) + 1].tolist())


def _children(rng: np.random.Generator, parent: Bools, count: int) -> States:
    """Make up to ``count`` distinct children, each one to three exchanges from the parent."""
    gone = np.flatnonzero(parent)
    here = np.flatnonzero(~parent)
    children: dict[str, Bools] = {}
    # Small stacks have fewer children than ``count``: stop drawing then.
    for _ in range(10 * count):
        if len(children) == count:
            break
        swaps = min(
            int(rng.integers(1, 4)), int(rng.integers(1, 4)), len(gone), len(here)
        )
        child = parent.copy()
        child[rng.choice(gone, swaps, replace=False)] = False
        child[rng.choice(here, swaps, replace=False)] = True
        children[key_of(child)] = child
    return np.array([*children.values()])
