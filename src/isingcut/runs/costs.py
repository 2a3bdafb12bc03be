"""What measurements cost, from what their parts cost: seconds, memory and disk.

Everything here is arithmetic on `probe.Timings` and the sizes of a model, so that an estimate
can be checked by hand: block evaluations are counted as the measurement itself makes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from isingcut.ising.states import States, states_of

if TYPE_CHECKING:
    from isingcut.runs.probe import Timings

# Residual streams that a block holds beside its input: as `streamed.replay` reckons.
_BLOCK_STREAMS = 64
# Numbers that a row takes in a journal: eight bytes in base 64.
_JOURNAL_NUMBER = 11
_SLACK = 128 << 20


@dataclass(frozen=True)
class Shape:
    """Sizes that costs depend on, in bytes where nothing else is said.

    Attributes:
        blocks: N.
        parts: of each block in memory, in its dtype.
        outside: of the embedding, the head and the rest.
        largest: of the largest part.
        stored: of the checkpoint.
        stored_blocks: of each block there.
        stream: of one token's residual stream.
        word: of one logit.
        vocabulary: words.
        process: that Python and its packages take.
        allowed: that the process may take; below this the model is streamed.
        streamed: whether it is.
        length: tokens of a sample.
        batch_tokens: tokens computed at a time.
    """

    blocks: int
    parts: tuple[int, ...]
    outside: int
    largest: int
    stored: int
    stored_blocks: tuple[int, ...]
    stream: int
    word: int
    vocabulary: int
    process: int
    allowed: int
    streamed: bool
    length: int
    batch_tokens: int

    @property
    def weights(self) -> int:
        """Bytes of all weights in memory."""
        return sum(self.parts) + self.outside

    @property
    def batch(self) -> int:
        """Tokens of a micro-batch: whole samples."""
        return max(1, self.batch_tokens // self.length) * self.length

    @property
    def held(self) -> int:
        """Bytes that the process and the weights it holds take."""
        return self.process + (2 * self.largest if self.streamed else self.weights)

    @property
    def room(self) -> int:
        """Bytes for hidden states between the blocks of a streamed model."""
        work = _BLOCK_STREAMS * self.batch * self.stream + 4 * 4 * self.length * self.vocabulary
        return max(1, self.allowed - self.held - work - _SLACK)


@dataclass(frozen=True)
class Cost:
    """What one measurement takes.

    Attributes:
        seconds: on this machine, in one process.
        memory: peak of the process, bytes.
        disk: bytes written.
    """

    seconds: float
    memory: int
    disk: int = 0


def visits(states: States) -> npt.NDArray[np.int64]:
    """(N,) how often each block is run to measure states (S, N) and the original."""
    n = states.shape[1]
    count = np.ones(n, dtype=np.int64)
    previous = np.zeros(n, dtype=bool)
    for state in states[np.lexsort(states.T[::-1])]:
        differ = np.flatnonzero(previous != state)
        first = int(differ[0]) if len(differ) else n
        count[first:] += ~state[first:]
        previous = state
    return count


def pairs(n: int) -> States:
    """The single and pair removals of n blocks."""
    return states_of(n, [*combinations(range(n), 1), *combinations(range(n), 2)])


def random_states(n: int, remove: int, count: int) -> States:
    """States that stand for those of a ranking."""
    return np.asarray(np.random.default_rng(0).random((count, n)).argsort(1).argsort(1) < remove)


def measured(shape: Shape, t: Timings, states: States, samples: int) -> Cost:
    """The losses of states on samples."""
    tokens = samples * shape.length
    runs = float(visits(states) @ np.array(t.blocks))
    seconds = tokens * (runs + t.entering + (len(states) + 1) * t.comparing)
    logits = shape.batch * shape.vocabulary * shape.word
    work = logits + _BLOCK_STREAMS * shape.batch * shape.stream
    disk = 2 * (len(states) + 1) * samples * _JOURNAL_NUMBER
    if shape.streamed:
        streams = tokens * (len(states) + 3) * shape.stream
        return _streamed(shape, t, seconds, streams, 1, disk)
    memory = shape.held + work + (shape.blocks + 1) * shape.batch * shape.stream
    return Cost(seconds, memory, disk)


def first_derivatives(shape: Shape, t: Timings, samples: int) -> Cost:
    """Gate gradients of samples."""
    tokens = samples * shape.length
    disk = samples * shape.blocks * _JOURNAL_NUMBER
    seconds = tokens * (t.gradients + t.entering)
    if shape.streamed:
        # The blocks run forward once more, and the streams that do not fit go to a file.
        seconds += tokens * sum(t.blocks)
        streams = tokens * (shape.blocks + 4) * shape.stream
        return _streamed(shape, t, seconds, streams, 2, disk)
    logits = min(shape.batch * shape.vocabulary, 1 << 24) * shape.word
    return Cost(seconds, shape.held + shape.batch * t.saved_gradients + logits, disk)


def second_derivatives(shape: Shape, t: Timings, kind: str, samples: int) -> Cost:
    """A curvature matrix of samples."""
    n = shape.blocks
    seconds = samples * shape.length * (t.curvature[kind] + t.entering)
    tangents = 2 * n * shape.batch * shape.stream
    logits = 8 * shape.length * shape.vocabulary * 4
    memory = shape.held + shape.batch * t.saved_curvature + tangents + logits
    return Cost(seconds, memory, samples * n * (n + 1) * _JOURNAL_NUMBER)


def searched(shape: Shape, t: Timings, passes: float, samples: int) -> Cost:
    """A search with a budget of passes over the samples; its states are much like the pairs."""
    states = pairs(shape.blocks)
    whole = measured(shape, t, states, samples)
    share = passes * shape.blocks / float(visits(states).sum())
    return Cost(share * whole.seconds, whole.memory, int(share * whole.disk))


def _streamed(
    shape: Shape, t: Timings, seconds: float, streams: int, reads: int, disk: int
) -> Cost:
    """Reading hides behind computing where enough streams fit; else the disk sets the pace."""
    sweeps = max(1, -(-streams // shape.room))
    reading = t.reading * shape.weights * reads
    return Cost(max(seconds, sweeps * reading) + reading / reads, shape.allowed, disk)


def loaded(shape: Shape, t: Timings) -> Cost:
    """The model into memory; or its norms, and a look at every block."""
    return Cost(t.reading * shape.weights, shape.held)


def excised(shape: Shape, t: Timings, kept: Sequence[int]) -> Cost:
    """The smaller checkpoint, written, loaded again and compared."""
    size = shape.stored - sum(shape.stored_blocks) + sum(shape.stored_blocks[i] for i in kept)
    share = size / max(1, shape.stored)
    # Read, written and read. The proof computes two short texts, and a few words twice.
    seconds = 3 * share * t.reading * shape.weights + 2 * 48 * 2 * sum(t.blocks) + 32 * t.decoding
    if shape.streamed:
        return Cost(seconds + 2 * t.reading * shape.weights, shape.held, size)
    return Cost(seconds, shape.held + int(share * shape.weights), size)


def evaluated(shape: Shape, t: Timings, kept: Sequence[int], samples: int, startup: float) -> Cost:
    """Both models on unseen text; in memory also their speed, and their memory in new processes."""
    tokens = samples * shape.length
    left = sum(t.blocks[i] for i in kept) / max(1e-30, sum(t.blocks))
    seconds = tokens * ((1 + left) * sum(t.blocks) + 3 * t.comparing)
    if shape.streamed:
        reading = (1 + left) * t.reading * shape.weights
        return Cost(max(seconds, reading), shape.allowed)
    # Six rounds of a prefill and 35 words, 48 words of text, four after each fresh load.
    words = 6 * 35 + 48 + 4
    seconds += (1 + left) * (words * t.decoding + 7 * shape.length * sum(t.blocks))
    seconds += 2 * startup + (1 + left) * t.reading * shape.weights
    logits = 2 * shape.batch * shape.vocabulary * shape.word
    return Cost(seconds, shape.held + int(left * shape.weights) + 2 * logits)
