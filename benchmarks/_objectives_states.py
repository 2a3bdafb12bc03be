"""Which states the study of objectives looks at."""

from __future__ import annotations

import json
import random
from typing import Any

from _parts_command import HERE


def chosen_states(m: int, count: int, n: int, seed: int = 0) -> list[list[int]]:
    """States that methods chose, as the quality benchmark has them, and exchanges in three."""
    found: dict[tuple[int, ...], None] = {}

    def walk(x: Any) -> None:
        if isinstance(x, dict):
            for k in ("removed", "blocks"):
                value = x.get(k)
                if isinstance(value, list) and len(value) == m:
                    found[tuple(sorted(map(int, value)))] = None
            for value in x.values():
                walk(value)
        elif isinstance(x, list):
            for value in x:
                walk(value)

    walk(json.loads((HERE / "results" / "quality.json").read_text(encoding="utf-8"))["tables"])
    starts = [list(range(13, 19)), [12, 13, 14, 17, 25, 26], [5, 12, 14, 16, 17, 18]]
    return exchanged([list(s) for s in found], starts, m, count, n, seed)


def windows(m: int, count: int, n: int, seed: int = 0) -> list[list[int]]:
    """Runs of blocks that leave a sixth of them at both ends, and exchanges in the middle three."""
    states = [list(range(a, a + m)) for a in range(n // 6, n - n // 6 - m + 1)]
    middle = len(states) // 2
    return exchanged(states[:count], states[middle - 1 : middle + 2], m, count, n, seed)


def exchanged(
    states: list[list[int]], starts: list[list[int]], m: int, count: int, n: int, seed: int
) -> list[list[int]]:
    """So many states: those given, and others with one or two blocks of a start exchanged."""
    draw = random.Random(seed)
    while len(states) < count:
        state, k = set(draw.choice(starts)), draw.choice((1, 2))
        state -= set(draw.sample(sorted(state), k))
        state |= set(draw.sample([i for i in range(1, n - 1) if i not in state], k))
        if len(state) == m and sorted(state) not in states:
            states.append(sorted(state))
    return states
