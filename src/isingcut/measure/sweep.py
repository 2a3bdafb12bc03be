"""Gradients in the gates of all blocks, one block open at a time.

On the way there the stream before every block is kept; from the head the gradient of the loss
comes back, and is pulled through each block, computed again unless its graph was kept. In memory
all graphs are kept, and this is a plain backward pass; of a model that is read from disk none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from isingcut.data.tokens import TokenSet
from isingcut.measure.boundaries import Boundaries
from isingcut.measure.gates import gated_block, row_dots
from isingcut.measure.graphs import Graphs, gated
from isingcut.measure.pace import chunks
from isingcut.models.replay import BLOCK_STREAMS, EMBED, HEAD, Recording, Replay

Toward = Callable[[Recording, TokenSet, Tensor, Tensor], Tensor]
"""Gradient (B, T, D) of the summed sample losses in the stream that leaves the blocks: from the
recording, the micro-batch, that stream, and the original model's."""


def streams_kept(replay: Replay) -> int:
    """Residual streams that `gate_rows` keeps of each micro-batch, graphs aside.

    Before and after every block, what entered (the recording has it), the original model's before
    and after one block, and two gradients. Less where graphs are kept, which need no stream.
    """
    return len(replay) + 6


def gate_chunks(replay: Replay, batches: Sequence[TokenSet]) -> Iterator[tuple[slice, int]]:
    """`chunks` for `gate_rows`: one micro-batch at a time where reading costs nothing.

    So it has the most memory for its graphs, of which each that is kept saves a forward pass.
    """
    together = not replay.store.in_place
    return chunks(replay, batches, streams_kept(replay), together=together)


def gate_rows(
    replay: Replay,
    batches: Sequence[TokenSet],
    gate: str,
    toward: Toward,
    *,
    room: int,
    removed: npt.NDArray[np.bool_] | None = None,
    folder: Path | None = None,
    advance: Callable[[float], object] = lambda share: None,
) -> list[Tensor]:
    """Gradients of each sample's loss in all gates, of each micro-batch: (B, N) float32.

    Args:
        gate: ``"sublayer"`` or ``"block"``.
        room: bytes that streams and graphs may take; further streams go to a file.
        removed: (N,) bool, blocks whose gates stand at 0, and are block gates; the others' stand
            at 1.
        folder: where that file is made; None takes the system's.
        advance: told of each step, as a share of all that a micro-batch takes.

    Complexity: each block is opened twice. Where weights stay, the graphs of the last blocks are
    kept, as many as there is room for; the other blocks are computed once more.
    """
    n = len(replay)
    streams = sum(streams_kept(replay) * replay.stream_bytes(batch) for batch in batches)
    # Weights that go again cannot stay in a graph; and a block is computed again while they come.
    left = room - streams if replay.store.in_place else 0
    graphs = Graphs(left, BLOCK_STREAMS * max(map(replay.stream_bytes, batches)))
    with closing(Boundaries(room, folder)) as boundaries:
        ways = [
            _Way(replay, batch, number, len(batches), gate, removed, boundaries, graphs)
            for number, batch in enumerate(batches)
        ]
        order = [EMBED, *range(n), HEAD, *reversed(range(n))]
        for step, part in enumerate(replay.store.sweep(order)):
            for way in ways:
                if part == EMBED:
                    way.enter()
                elif part == HEAD:
                    way.turn(toward)
                else:
                    (way.there if step <= n else way.back)(int(part))
                    advance(1 / (2 * n))
    return [way.rows for way in ways]


class _Way:
    """One micro-batch, number ``number`` of ``count``, on its way through the blocks and back."""

    def __init__(
        self,
        replay: Replay,
        batch: TokenSet,
        number: int,
        count: int,
        gate: str,
        removed: npt.NDArray[np.bool_] | None,
        boundaries: Boundaries,
        graphs: Graphs,
    ) -> None:
        self._replay, self._batch, self._number, self._count = replay, batch, number, count
        self._gate, self._removed = gate, removed
        self._boundaries, self._graphs = boundaries, graphs
        self.rows = torch.zeros(batch.samples, len(replay), device=replay.device)

    def enter(self) -> None:
        """Through the embedding."""
        with torch.no_grad():
            self._recording = self._replay.record(self._batch.input_ids)
        self._original = self._recording.entered
        self._boundaries.put((0, self._number), self._recording.entered)

    def there(self, block: int) -> None:
        """Through a block, whose graph is kept if those of all that come after it can be too."""
        place, device = (block, self._number), self._replay.device
        if self._removed is not None:
            with torch.no_grad():
                self._original = self._recording.block(block, self._original)
        if self._is_removed(block):
            after = self._boundaries.get(place, device)
        elif self._graphs.has_room((len(self._replay) - block) * self._count - self._number):
            before = self._boundaries.take(place, device)
            after = self._graphs.run(self._recording, block, self._number, before, self._gate)
        else:
            before = self._boundaries.get(place, device)
            ones = torch.ones(len(before), device=device)
            with torch.no_grad():
                after = gated_block(self._recording, block, before, ones, self._gate, ones=True)
        self._boundaries.put((block + 1, self._number), after)

    def turn(self, toward: Toward) -> None:
        """Through the head, to the gradient that goes back."""
        place, device = (len(self._replay), self._number), self._replay.device
        stream = self._boundaries.take(place, device).detach()
        original = stream if self._removed is None else self._original
        self._toward = toward(self._recording, self._batch, stream, original)

    def back(self, block: int) -> None:
        """The gradient through a block."""
        gate = self._graphs.take(block, self._number)
        if gate is None:
            before = self._boundaries.take((block, self._number), self._replay.device)
            if self._is_removed(block):
                # A gate at 0 lets the gradient pass unchanged.
                with torch.no_grad():
                    change = self._recording.block(block, before) - before
                    self.rows[:, block] = row_dots(self._toward, change)
                return
            gate, _ = gated(self._recording, block, before, self._gate)
        self.rows[:, block], self._toward = gate.backward(self._toward)

    def _is_removed(self, block: int) -> bool:
        return self._removed is not None and bool(self._removed[block])
