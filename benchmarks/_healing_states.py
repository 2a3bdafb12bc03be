"""States of the healing benchmark: what each method removes, chosen on the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isingcut.baselines import registry as baselines
from isingcut.data.calibration import build
from isingcut.energies.search import Search, Target
from isingcut.measure.work import Work
from isingcut.models.architectures import find_stack, stack_modules
from isingcut.models.replay import Replay
from isingcut.options.types import TEXT


def search_states(
    original: Any, counts: Sequence[int], peers: Sequence[str], tokens: int, work: Work, seed: int
) -> dict[str, dict[str, list[int]]]:
    """The peers' states and, as `searched`, that of a search with the budget of a greedy path.

    Args:
        original: a loaded model.
        counts: numbers of blocks to remove, the keys of the outcome.
        tokens: of the text that all choose on, in samples of 256.
    """
    model = original.model
    replay = Replay(model, stack_modules(model, find_stack(model)))
    # Seed 0: code that comes later in its order is judged.
    text = build(
        TEXT,
        original.tokenizer,
        samples=tokens // 256,
        rank_samples=2,
        report_samples=2,
        length=256,
        seed=0,
    ).splits["energy"]
    found = {}
    for m in sorted(counts, reverse=True):
        rows = {
            p: list(baselines.get(p)().choose(replay, text, m, work, seed).removed) for p in peers
        }
        target = Target.count(len(replay), m)
        best = Search(replay, text, work, [target], seed=seed).run().best(m)
        found[str(m)] = {"searched": list(best), **rows}
    return found
