"""EvoPress at a stated budget, and the long run of it with a trace; `refined` beside that.

An evolution of G generations is the beginning of one of more, and what it measured is in the
journal. So it is simply run with more generations until the budget or the time is spent: what
was measured is read back, and the price is counted as if it were one run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _quality_store import Part, Price
from isingcut.baselines import registry as baselines
from isingcut.baselines.base import Outcome
from isingcut.data.tokens import TokenSet
from isingcut.measure.work import Work

if TYPE_CHECKING:
    from _quality_methods import Choosing

FIRST_STEP, LAST_STEP = 2048, 32768
INITIAL = 64


def evolution(tokens: TokenSet, generations: int, initial: int = INITIAL) -> Any:
    """EvoPress with its published offspring, survivors and, where the text suffices, tokens.

    A smaller text takes itself for the last step and a quarter of itself for the first.
    """
    held = int(tokens.mask.sum())
    first = FIRST_STEP if held >= 4 * FIRST_STEP else max(1, held // 4)
    steps = (first, min(LAST_STEP, held))
    part = baselines.get("evopress")
    return part(generations=generations, step_tokens=steps, initial=initial)


def within(
    choosing: Choosing, remove: int, seed: int, budget: float, work: Work
) -> tuple[Any, Outcome]:
    """The longest evolution of at most ``budget`` passes, and what it found.

    Where not even the published number of random first states fits, half as many are drawn,
    and so on.
    """
    replay, tokens, scale = choosing.bench.replay, choosing.wide, choosing.scale

    def run(generations: int, initial: int) -> tuple[Any, Outcome]:
        part = evolution(tokens, generations, initial)
        found = part.choose(replay, tokens, remove, work, seed)
        priced = dataclasses.replace(found, passes=found.passes * scale, heads=found.heads * scale)
        return part, priced

    initial = INITIAL
    best = run(0, initial)
    while best[1].passes > budget and initial > 1:
        initial //= 2
        best = run(0, initial)
    generations = 0
    while generations < published_generations(len(replay), remove):
        longer = run(generations + 1, initial)
        if longer[1].passes > budget:
            break
        best, generations = longer, generations + 1
    return best


def published_generations(n: int, remove: int) -> int:
    """M (N - M) / 1.5, rounded up."""
    return math.ceil(remove * (n - remove) / 1.5)


def large_parts(choosing: Choosing, remove: int, minutes: float, share: float) -> list[Part]:
    """The long evolution on the large pool, and `refined` there with a share of its tokens.

    The evolution ends after ``minutes`` of work or at its published number of generations; a
    second call after an interruption goes on where it was, its clock too.
    """
    bench = choosing.bench
    pool = bench.large_pool
    held = int(pool.mask.sum())

    def evolve(journal: Path) -> dict[str, Any]:
        work, clock = bench.work(journal), journal.with_suffix(".clock")
        before, reached = json.loads(clock.read_text()) if clock.exists() else (0.0, 0)
        began = time.perf_counter()
        limit = published_generations(bench.n, remove)
        trace: list[dict[str, Any]] = []
        generations = 0
        while True:
            part = evolution(pool, generations)
            found = part.choose(bench.replay, pool, remove, work, 0)
            if not trace or trace[-1]["removed"] != list(found.removed):
                trace.append(
                    {"passes": found.passes, "heads": found.heads, "removed": list(found.removed)}
                )
            spent = before + time.perf_counter() - began
            # What was reached before is read back: that costs nothing and ends nothing.
            if generations >= reached:
                clock.write_text(json.dumps([spent, generations]))
            if generations >= limit or (generations >= reached and spent > 60 * minutes):
                break
            generations += 1
            print(f"{'':13}generation {generations} of {limit}, {spent / 60:.1f} min", flush=True)
        clock.unlink()
        return {
            "remove": remove,
            "pool_tokens": held,
            "passes": found.passes,
            "heads": found.heads,
            "generations": generations,
            "published_generations": limit,
            "minutes": round(spent / 60, 1),
            "trace": trace,
        }

    def refine(journal: Path) -> dict[str, Any]:
        budget = share * bench.store.read("large/evopress")["passes"]
        content = choosing.search((remove,), budget, 0, journal, "refined", pool)
        (row,) = content["choices"]
        trace = [t for t in content["more"]["trace"] if t.get("remove", remove) == remove]
        return {
            "remove": remove,
            "pool_tokens": held,
            "passes": row["passes"],
            "heads": row["heads"],
            "share": share,
            "trace": [
                *({k: t[k] for k in ("passes", "removed")} for t in trace),
                {"passes": row["passes"], "removed": row["removed"]},
            ],
        }

    seconds = bench.speed.block_pass + bench.speed.head
    passes = 60 * minutes / held / seconds
    return [
        Part("large/evopress", evolve, (Price(held, passes, passes),)),
        Part(
            "large/refined",
            refine,
            (Price(held, share * passes, share * passes),),
            ("large/evopress",),
        ),
    ]
