"""The tree of decisions that states share: those that agree on their first blocks share the
hidden states that entered where they part, and each node of the tree is computed once.

The states are sorted by their bits, the original, which removes nothing, first. A branch at depth
i is then a range of states that agree on their first i blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

States = npt.NDArray[np.bool_]
T = TypeVar("T")


def in_order(states: States) -> npt.NDArray[np.int64]:
    """The order of the bits of states (S, N), in which neighbours share the longest prefixes."""
    # lexsort's last key is the first to sort by.
    return np.lexsort(states.T[::-1]) if len(states) else np.zeros(0, dtype=np.int64)


def own_blocks(states: States) -> States:
    """(S, N) of sorted states: the blocks that are run for each and not for the one before it.

    The first one shares with the original, whose own N are not counted.
    """
    before = np.concatenate([np.zeros_like(states[:1]), states[:-1]])
    parted = np.logical_or.accumulate(states != before, axis=1)
    return parted & ~states


def tree_nodes(states: States) -> int:
    """Block evaluations per sample that measuring the states (S, N) takes beside the original.

    It is the unit in which every search pays for its states.
    """
    return int(own_blocks(states[in_order(states)]).sum())


def walk(
    states: States,
    entered: T,
    run: Callable[[int, T], T],
    *,
    by_block: bool,
    shared: bool = True,
) -> Iterator[tuple[int, int, T]]:
    """Run the blocks of every state, each node of the tree once.

    Args:
        states: (S, N) bool, sorted.
        entered: the stream that enters the first block.
        run: a block's number and the stream before it, to the stream after it.
        by_block: run a block on all branches before the next one, so that it is opened once: as
            many streams are kept as there are states. Else a branch is followed to its end
            before the next one, and N + 1 streams are kept.
        shared: off, every state is a tree of its own.

    Yields:
        (first, last, stream): what leaves the blocks of the states first to last - 1, which are
        the same; in order.
    """
    ends = [0, len(states)] if shared else range(len(states) + 1)
    waiting = [(0, deque([(first, last, entered)])) for first, last in pairwise(ends)][::-1]
    while waiting:
        depth, branches = waiting.pop()
        grown: deque[tuple[int, int, T]] = deque()
        while branches:
            first, last, stream = branches.popleft()
            if depth == states.shape[1]:
                yield first, last, stream
                continue
            middle = first + int((~states[first:last, depth]).sum())
            if first < middle:
                grown.append((first, middle, run(depth, stream)))
            if middle < last:
                grown.append((middle, last, stream))
        if by_block and grown:
            waiting.append((depth + 1, grown))
        else:
            waiting += [(depth + 1, deque([branch])) for branch in reversed(grown)]
