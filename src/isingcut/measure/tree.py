"""The tree of decisions that states share: those that agree on their first blocks share the
hidden states that entered where they part, and each node of the tree is computed once.

The states are sorted by their bits, the original, which removes nothing, first. A branch at depth
i is then a range of states that agree on their first i blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
    trees: Sequence[tuple[States, T]],
    run: Callable[[int, int, T], T],
    *,
    by_block: bool,
    shared: bool = True,
) -> Iterator[tuple[int, int, int, T]]:
    """Run the blocks of every state of some trees, each node of a tree once.

    Args:
        trees: of each its states (S, N) bool, sorted, and the stream that enters the first block.
        run: a tree's place, a block's number and the stream before it, to the stream after it.
        by_block: run a block on all branches of all trees before the next one, so that it is
            opened once: as many streams are kept as there are states. Else a branch is followed
            to its end before the next one, and N + 1 streams are kept.
        shared: off, every state is a tree of its own.

    Yields:
        (tree, first, last, stream): what leaves the blocks of a tree's states first to last - 1,
        which are the same; in order.
    """
    roots = [
        (tree, first, last, entered)
        for tree, (states, entered) in enumerate(trees)
        for first, last in pairwise([0, len(states)] if shared else range(len(states) + 1))
    ]
    waiting = [(0, deque(roots))] if by_block else [(0, deque([root])) for root in reversed(roots)]
    while waiting:
        depth, branches = waiting.pop()
        grown: deque[tuple[int, int, int, T]] = deque()
        while branches:
            tree, first, last, stream = branches.popleft()
            states = trees[tree][0]
            if depth == states.shape[1]:
                yield tree, first, last, stream
                continue
            middle = first + int((~states[first:last, depth]).sum())
            if first < middle:
                grown.append((tree, first, middle, run(tree, depth, stream)))
            if middle < last:
                grown.append((tree, middle, last, stream))
        if by_block and grown:
            waiting.append((depth + 1, grown))
        else:
            waiting += [(depth + 1, deque([branch])) for branch in reversed(grown)]
