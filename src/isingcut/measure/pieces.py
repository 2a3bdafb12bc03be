"""Pieces of a measurement of states: a micro-batch and some of the states, in walking order.

One process takes a micro-batch with all its states. Where there are fewer micro-batches than
processes, their states are parted as well; a state's losses do not depend on that, only the
prefixes shared with states of another piece are run again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Piece:
    """States first, first + 1, ..., last - 1 of the walk, on one micro-batch."""

    batch: int
    first: int
    last: int

    @property
    def key(self) -> str:
        """Its name in a journal."""
        return f"{self.batch}:{self.first}-{self.last}"

    @classmethod
    def read(cls, key: str) -> Piece:
        """The piece of that name."""
        batch, _, states = key.partition(":")
        first, _, last = states.partition("-")
        return cls(int(batch), int(first), int(last))


def left(
    done: Iterable[str], batches: int, states: int, processes: int, repeated: float
) -> list[Piece]:
    """What is still to be measured, in pieces that keep all processes busy.

    Args:
        done: names of finished pieces, however they were cut.
        batches, states: all there is.
        processes: how many take pieces.
        repeated: what each further piece of a micro-batch costs in advance, as a share of the
            whole micro-batch.
    """
    finished: dict[int, list[Piece]] = {}
    for piece in map(Piece.read, done):
        finished.setdefault(piece.batch, []).append(piece)
    gaps: list[Piece] = []
    for batch in range(batches):
        end = 0
        had = sorted(finished.get(batch, []), key=lambda p: p.first)
        for piece in had:
            if piece.first > end:
                gaps.append(Piece(batch, end, piece.first))
            end = max(end, piece.last)
        if end < states or not had:
            gaps.append(Piece(batch, end, states))
    parts = _parts(len(gaps), processes, repeated)
    return [part for gap in gaps for part in cut(gap, parts)]


def _parts(gaps: int, processes: int, repeated: float) -> int:
    """Into how many pieces each gap is cut so that all are done soonest."""

    def rounds(parts: int) -> float:
        return -(-gaps * parts // processes) * (1 / parts + repeated)

    return min(range(1, 2 * processes + 1), key=rounds)


def cut(gap: Piece, parts: int) -> list[Piece]:
    """A piece in at most so many parts of like size."""
    count = gap.last - gap.first
    parts = max(1, min(parts, count))
    ends = [gap.first + count * i // parts for i in range(parts + 1)]
    return [Piece(gap.batch, a, b) for a, b in pairwise(ends)]
