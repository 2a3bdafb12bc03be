"""States, and the array types of the package.

A state is a row (N,) of bools, True where a block is removed. In files, on the command line and
in messages, a state is the list of its removed blocks; as a key of a dictionary or a journal, it is
that list as text.
"""

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from isingcut.errors import InputError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
States = NDArray[np.bool_]


def read_whole(value: Any, what: str) -> int:
    """Return a whole number of Python, NumPy or PyTorch as an `int`.

    Raises:
        InputError: any other value, also a boolean; ``what`` names it in the message.
    """
    try:
        if not isinstance(value, bool | np.bool_):
            return operator.index(value)
    except TypeError:
        pass
    raise InputError(f"{what} must be a whole number, got {value!r:.60}")


def states_of(n: int, removed: Iterable[Iterable[int]]) -> States:
    """Make states (S, N) from their removed blocks."""
    rows = [list(blocks) for blocks in removed]
    states = np.zeros((len(rows), n), dtype=np.bool_)
    for state, blocks in zip(states, rows, strict=True):
        state[blocks] = True
    return states


def blocks_of(state: Bools) -> list[int]:
    """Return the removed blocks of one state, ascending."""
    return [int(i) for i in np.flatnonzero(state)]


def swaps(one: Iterable[int], other: Iterable[int]) -> int:
    """Count the removed blocks of one state that the other keeps; the larger of both directions."""
    a = set(one)
    b = set(other)
    return max(len(a - b), len(b - a))


def key_of(state: Bools) -> str:
    """Return the removed blocks of one state as text, for example ``"3,7"``."""
    return ",".join(map(str, blocks_of(state)))
